"""The frozen base model: loading it, finding the modules to adapt, attention over packed rows."""
