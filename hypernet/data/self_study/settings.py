"""StudySettings: what self-study makes. Each field is also an option of `hypernet self-study`, with this help."""

import dataclasses
from typing import Any

from hypernet.io.paths import output_folder

# What an option is about: the headings of the command's help.
TEXTS, ASKED, WORK = "Texts", "What is asked and stored", "How the work is done"


def _setting(default: Any = dataclasses.MISSING, *, of: str | None = None, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"heading": of, "help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What is made; the defaults are the command's.

    Raises:
        ValueError: a value makes no sense, or not with another.
    """

    output_dir: str = _setting(help="Folder for the shards.")
    base_model: str = _setting(help="The model that answers: hub name or folder.")
    questions_by: str = _setting("", help="The model that asks; without it the base model.")
    documents: str = _setting("", of=TEXTS, help="A file or a folder of texts.")
    questions: str = _setting(
        "", of=TEXTS, help="Or a file of texts with questions: .json as SQuAD's, .jsonl or .parquet in its columns."
    )
    dataset: str = _setting("", of=TEXTS, help="Or a dataset on the hub, read as a stream.")
    dataset_config: str = _setting("", of=TEXTS, help="Its configuration.")
    dataset_split: str = _setting("train", of=TEXTS, help="Its split.")
    dataset_column: str = _setting("text", of=TEXTS, help="The column with the text.")
    # hypernet.data.sources.MAX_CORRUPT_ROWS, which takes seconds to import.
    max_corrupt_rows: int = _setting(
        100, of=TEXTS, help="Its rows without a text that are left out; one more ends the run."
    )
    max_documents: int = _setting(0, of=TEXTS, help="Only the first so many; 0: all.")
    max_chunk_tokens: int = _setting(1024, of=TEXTS, help="Tokens of a text studied at once.")
    questions_per_chunk: int = _setting(5, of=ASKED, help="At most; doubles are dropped.")
    max_question_tokens: int = _setting(64, of=ASKED, help="Most tokens of a question.")
    max_answer_tokens: int = _setting(256, of=ASKED, help="Most tokens of an answer.")
    question_temperature: float = _setting(1.0, of=ASKED, help="0: the likeliest question.")
    answer_temperature: float = _setting(0.0, of=ASKED, help="0: the likeliest answer.")
    top_k: int = _setting(16, of=ASKED, help="Tokens stored at each place of an answer, with their probabilities.")
    kept_answers: str = _setting(
        "right", of=ASKED, help="Of a file's questions: right (they hold the file's answer) or all."
    )
    seed: int = _setting(0, of=ASKED, help="Of what is sampled.")
    chunks_per_shard: int = _setting(256, of=WORK, help="Chunks in a parquet file.")
    engine: str = _setting("transformers", of=WORK, help="transformers, or vllm where it is installed.")
    batch_size: int = _setting(8, of=WORK, help="Prompts at once (transformers).")
    device: str = _setting("cpu", of=WORK, help="cpu or cuda (transformers).")
    dtype: str = _setting("", of=WORK, help="Of the weights: float32, bfloat16 or float16; else as they are stored.")
    process_index: int = _setting(0, of=WORK, help="Which of the processes this is, from 0.")
    num_processes: int = _setting(1, of=WORK, help="How many processes divide the shards among themselves.")

    def __post_init__(self) -> None:
        output_folder(self.output_dir)
        if [bool(given) for given in (self.documents, self.questions, self.dataset)].count(True) != 1:
            raise ValueError(
                "Give one of documents (a file or folder), questions (a file) and dataset (a name on the hub)."
            )
        for name in ("questions_per_chunk", "max_chunk_tokens", "max_question_tokens", "max_answer_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index is {self.process_index}; it counts from 0 to num_processes - 1.")
        if self.kept_answers not in ("right", "all"):
            raise ValueError(f"kept_answers should be right or all, got {self.kept_answers!r}.")
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"Unknown engine {self.engine!r}; choose transformers or vllm.")

    def described(self) -> dict[str, Any]:
        """What decides the shards' content: not where they lie and how the work is divided."""
        free = {"output_dir", "batch_size", "device", "process_index", "num_processes", "max_corrupt_rows"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
