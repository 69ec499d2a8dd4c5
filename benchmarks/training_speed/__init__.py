"""How fast training is: one step beside padded ones, and train.py beside an earlier one."""
