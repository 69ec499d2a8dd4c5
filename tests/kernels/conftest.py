"""Interpreted kernels at half of the time, by leaving out what Triton's interpreter does again and again.

It prepares `triton.language` at every call of a helper, 1.6 ms each, a fifth of all the time: the kernel's start has
done so, and what Triton's own helpers see stays prepared from their first call on. And it follows every sum and product
of integers in 64 bits to see whether it overflows, another quarter: that is kept for `overflow_is_checked` tests.
"""

from dataclasses import replace

import pytest

from hypernet.kernels.lora_delta import kernels as triton_kernels

_prepared: set[str] = set()  # modules of helpers


@pytest.fixture(autouse=True)
def quick_interpreter(request, monkeypatch):
    if not triton_kernels.interpreted():
        return
    from triton.runtime import interpreter

    def call_helper(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in _prepared and module.startswith("triton."):
            interpreter._patch_lang(self.fn)
            _prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_helper)
    if request.node.get_closest_marker("overflow_is_checked") is None:
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
