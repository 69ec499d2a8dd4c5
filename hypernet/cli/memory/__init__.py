"""hypernet memory ...: `texts` has the token tier's commands, `tiers` those of adapters, `weights` those of sleep."""
