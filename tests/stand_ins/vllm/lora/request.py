"""LoRARequest: an adapter's name, number and folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        if not self.lora_name or not Path(self.lora_path).is_dir():
            raise ValueError(f"lora_path is no folder: {self.lora_path!r}")
