"""What memories gain from being used, and what they tell of whoever used them."""
