"""What the memory is measured by: its store (speed, kills, schedules), its dates, and its peers."""
