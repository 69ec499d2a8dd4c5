"""Self-study: a model writes questions about texts, and the base model answers them with the text in its prompt.

    python -m hypernet.data.self_study documents=notes/ base_model=assets/tiny/base_model output_dir=outputs/study
    source = SelfStudy("train", path="outputs/study", tokenizer=tokenizer)      # for training: `hypernet.data.sources`

Answers are stored with the base model's k most likely tokens at each place, so that training needs no teacher
(`hypernet.training.losses.context_distillation_kl_topk`). A shard is a parquet file that appears once it is
complete, with its provenance inside; run again, the command makes what is missing. Several processes divide
the shards among them.

Source: Charakorn et al. 2026, Doc-to-LoRA, appendix B (FineWeb-Edu, several questions per text, 16 tokens stored),
https://arxiv.org/abs/2602.15902
"""

import dataclasses
import hashlib
import json
import logging
import random
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hypernet.base.base_model import fingerprint, load_base_model, silence_torchao_warnings
from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.data.encyclopedia import SPLITS
from hypernet.data.records import UNKNOWN, Question, Record, StoredAnswer
from hypernet.data.sources import MAX_CORRUPT_ROWS, CorruptRows, TooManyCorruptRows
from hypernet.io.arguments import key_values
from hypernet.io.files import replaced
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import chunk_document
from hypernet.text.documents import Document, read_documents

log = logging.getLogger(__name__)
T = TypeVar("T")

_FORMAT_VERSION = 1
PROVENANCE = b"provenance"  # key of the parquet metadata
SHARDS_TOGETHER = 8  # shards whose passages are shuffled together, and that are kept in memory

# Said after a text; each question of a text is asked for in the next of these ways.
QUESTION_PROMPTS = (
    "Write one question that the text above answers. Give only the question.",
    "Which detail of the text above, such as a name, a number or a date, could one ask for? Give only the question.",
    "Write one question whose answer needs two different statements of the text above. Give only the question.",
    "Write one question about a reason or a consequence that the text above explains. Give only the question.",
    "Write one request to sum up a part of the text above, naming what it is about. Give only the request.",
)

_HELP = """\
Write questions about texts, answer them with the text in the prompt, and store the answers' most likely tokens.

  python -m hypernet.data.self_study documents=notes/ base_model=assets/tiny/base_model output_dir=outputs/study
  python -m hypernet.data.self_study dataset=HuggingFaceFW/fineweb-edu dataset_config=sample-10BT \\
    max_documents=100000 base_model=google/gemma-2-2b-it questions_by=google/gemma-3-12b-it engine=vllm \\
    output_dir=outputs/fineweb

Run it again to make the shards that are missing; give process_index=0..n-1 and num_processes=n to n of them at once.

Settings:
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What is made; the defaults are the command's."""

    output_dir: str = dataclasses.field(metadata={"help": "folder for the shards"})
    base_model: str = dataclasses.field(metadata={"help": "the model that answers, hub name or folder"})
    documents: str = dataclasses.field(default="", metadata={"help": "file or folder of texts"})
    dataset: str = dataclasses.field(default="", metadata={"help": "or a dataset on the hub, read as a stream"})
    dataset_config: str = dataclasses.field(default="", metadata={"help": "its configuration"})
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "its split"})
    dataset_column: str = dataclasses.field(default="text", metadata={"help": "the column with the text"})
    max_corrupt_rows: int = dataclasses.field(
        default=MAX_CORRUPT_ROWS, metadata={"help": "its rows without a text that are left out; more end the run"}
    )
    max_documents: int = dataclasses.field(default=0, metadata={"help": "only the first so many; 0: all"})
    questions_by: str = dataclasses.field(default="", metadata={"help": "the model that asks; empty: the base model"})
    questions_per_chunk: int = dataclasses.field(default=5, metadata={"help": "at most; doubles are dropped"})
    max_chunk_tokens: int = dataclasses.field(default=1024, metadata={"help": "tokens of a text studied at once"})
    max_question_tokens: int = dataclasses.field(default=64, metadata={"help": "tokens of a question"})
    max_answer_tokens: int = dataclasses.field(default=256, metadata={"help": "tokens of an answer"})
    question_temperature: float = dataclasses.field(default=1.0, metadata={"help": "0: the likeliest question"})
    answer_temperature: float = dataclasses.field(default=0.0, metadata={"help": "0: the likeliest answer"})
    top_k: int = dataclasses.field(default=16, metadata={"help": "tokens stored at each place of an answer"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of what is sampled"})
    chunks_per_shard: int = dataclasses.field(default=256, metadata={"help": "chunks in a parquet file"})
    batch_size: int = dataclasses.field(default=8, metadata={"help": "prompts at once (transformers)"})
    engine: str = dataclasses.field(default="transformers", metadata={"help": "transformers, or vllm where installed"})
    device: str = dataclasses.field(default="cpu", metadata={"help": "cpu, cuda (transformers)"})
    dtype: str = dataclasses.field(default="", metadata={"help": "of the weights; empty: as they are stored"})
    process_index: int = dataclasses.field(default=0, metadata={"help": "which of the processes this is"})
    num_processes: int = dataclasses.field(default=1, metadata={"help": "that divide the shards among themselves"})

    def __post_init__(self) -> None:
        if bool(self.documents) == bool(self.dataset):
            raise ValueError("Give either documents= (a file or folder) or dataset= (a name on the hub).")
        for name in ("questions_per_chunk", "max_chunk_tokens", "max_question_tokens", "max_answer_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index is {self.process_index}; it counts from 0 to num_processes - 1.")
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"Unknown engine {self.engine!r}; choose transformers or vllm.")

    def described(self) -> dict[str, Any]:
        """What decides the shards' content: not where they lie and how the work is divided."""
        free = {"output_dir", "batch_size", "device", "process_index", "num_processes", "max_corrupt_rows"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


class Passage(NamedTuple):
    """A chunk of a document: what is studied at once."""

    document: Document
    span: tuple[int, int]
    num_tokens: int

    @property
    def text(self) -> str:
        return self.document.text[slice(*self.span)].strip()


class Engine(Protocol):
    """A model that writes."""

    tokenizer: PreTrainedTokenizerBase
    layout: ChatLayout
    fingerprint: str

    def write(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        """Continuations of rendered prompts, the closing token included where there is one."""
        ...

    def top_k(self, text: str, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        """How likely tokens were in answers to questions, (question, answer's ids) each, about a text."""
        ...


class TransformersEngine:
    """See `Engine`; the model runs in this process."""

    def __init__(self, base_model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> None:
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.layout = ChatLayout.of(tokenizer)
        self.fingerprint = fingerprint(base_model)

    @torch.no_grad()
    def write(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        device = next(self.base_model.parameters()).device
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        found = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for some in _in_groups(prompts, self.batch_size):
                inputs = self.tokenizer(
                    list(some), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
                ).to(device)
                output = self.base_model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **sampling,
                )
                found += [self._ended(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]
        return found

    def _ended(self, ids: list[int]) -> list[int]:
        """Up to the first closing token; behind it is padding."""
        ends = self.base_model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        return ids[:end]

    @torch.no_grad()
    def top_k(self, text: str, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        # One row for all questions, as in training: the text is read once, and the tokens are cut in the same places.
        encode = lambda part: self.tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
        prompts = [encode("\n\n" + question + self.layout.after_user) for question, _ in asked]
        segments = [
            Segment(prompt + ids, len(prompt), True, 0) for prompt, (_, ids) in zip(prompts, asked, strict=True)
        ]
        row = pack_row(encode(self.layout.before_user + text), segments)
        rows = pad_rows([row], pad_id=self.tokenizer.pad_token_id).to(next(self.base_model.parameters()).device)
        logits = packed_logits(self.base_model, rows, rows.target_kind >= 0)
        log_probs, indices = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
        ends = np.cumsum([len(ids) for _, ids in asked])[:-1]
        parts = (np.split(tensor.cpu().numpy(), ends) for tensor in (indices, log_probs))
        return [StoredAnswer(tuple(ids), *both) for (_, ids), *both in zip(asked, *parts, strict=True)]


class VllmEngine:
    """See `Engine`; the model runs in vLLM. Written after its documentation and never run here."""

    def __init__(self, source: str, *, dtype: str | None = None, seed: int = 0) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError("engine=vllm needs vLLM, which is not installed: pip install vllm.") from error
        self.model = LLM(model=source, dtype=dtype or "auto", seed=seed, max_logprobs=64)
        self.tokenizer = self.model.get_tokenizer()
        self.layout = ChatLayout.of(self.tokenizer)
        # Its weights are spread over processes; the name has to do.
        self.fingerprint = f"vllm:{source}"

    def write(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed)
        outputs = self.model.generate(self._inputs(prompts), settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def top_k(self, text: str, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        from vllm import SamplingParams

        prompts = [self.layout.prompt(question, text) for question, _ in asked]
        whole = [
            {"prompt_token_ids": inputs["prompt_token_ids"] + ids}
            for inputs, (_, ids) in zip(self._inputs(prompts), asked, strict=True)
        ]
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=k)
        answers = []
        for output, (_, ids) in zip(self.model.generate(whole, settings, use_tqdm=False), asked, strict=True):
            # It also gives the token that is there, which need not be among the k.
            best = [
                sorted(((p.logprob, token) for token, p in place.items()), reverse=True)[:k]
                for place in output.prompt_logprobs[-len(ids) :]
            ]
            indices = np.array([[token for _, token in place] for place in best])
            answers.append(StoredAnswer(tuple(ids), indices, np.array([[p for p, _ in place] for place in best])))
        return answers

    def _inputs(self, prompts: Sequence[str]) -> list[dict[str, list[int]]]:
        ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return [{"prompt_token_ids": row} for row in ids]


def study(settings: StudySettings, *, answerer: Engine | None = None, asker: Engine | None = None) -> list[Path]:
    """Makes the shards of this process that are missing.

    Args:
        answerer, asker: models that are loaded already; None loads those of the settings.

    Returns:
        The shards made now.

    Raises:
        ValueError: nothing to study, or a shard in output_dir was made with other settings.
    """
    folder = Path(settings.output_dir)
    answerer = answerer or _engine(settings, settings.base_model)
    if asker is None:
        asker = _engine(settings, settings.questions_by) if settings.questions_by else answerer
    provenance = {
        "format_version": _FORMAT_VERSION,
        "settings": settings.described(),
        "base_model_fingerprint": answerer.fingerprint,
        "questions_by_fingerprint": asker.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(answerer.tokenizer),
        "prompts": QUESTION_PROMPTS,
    }
    provenance = json.loads(json.dumps(provenance))  # as it will be read again
    folder.mkdir(parents=True, exist_ok=True)
    made, number = [], -1
    for number, passages in enumerate(_in_groups(_passages(settings, answerer.tokenizer), settings.chunks_per_shard)):
        if number % settings.num_processes != settings.process_index:
            continue
        path = folder / f"shard-{number:05d}.parquet"
        if path.exists():
            _check_same(path, provenance)
            continue
        sources = {passage.document.name: passage.document.sha256 for passage in passages}
        rows = list(_study_passages(settings, passages, answerer, asker, seed=_seed(settings.seed, number)))
        _write_shard(path, rows, {**provenance, "sources": sources})
        log.info("%s: %d answers about %d chunks", path, len(rows), len(passages))
        made.append(path)
    if number < 0:
        raise ValueError("There is nothing to study: the dataset gave no text.")
    return made


def _in_groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(items)
    while group := tuple(islice(iterator, size)):
        yield group


def _engine(settings: StudySettings, source: str) -> Engine:
    dtype = settings.dtype or None
    if settings.engine == "vllm":
        return VllmEngine(source, dtype=dtype, seed=settings.seed)
    base_model, tokenizer = load_base_model(source, device=settings.device, dtype=dtype)
    return TransformersEngine(base_model, tokenizer, batch_size=settings.batch_size)


def _seed(*key: int | str) -> int:
    return zlib.crc32("/".join(map(str, key)).encode())


def _passages(settings: StudySettings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    for document in _documents(settings):
        chunks = chunk_document(document.text, tokenizer, max_chunk_tokens=settings.max_chunk_tokens, add_affixes=False)
        for span, mask in zip(chunks.spans, chunks.mask, strict=True):
            if document.text[slice(*span)].strip():
                yield Passage(document, span, int(mask.sum()))


def _documents(settings: StudySettings) -> Iterator[Document]:
    if settings.documents:
        found: Iterator[Document] = iter(read_documents(settings.documents))
    else:
        found = _streamed(settings)
    yield from islice(found, settings.max_documents or None)


def _streamed(settings: StudySettings) -> Iterator[Document]:
    from datasets import load_dataset  # takes a second

    try:
        rows = load_dataset(
            settings.dataset, settings.dataset_config or None, split=settings.dataset_split, streaming=True
        )
        corrupt = CorruptRows(settings.dataset, settings.max_corrupt_rows)
        for number, row in enumerate(rows):
            text = row[settings.dataset_column]
            if not isinstance(text, str):
                corrupt.skip(f"Row {number} has {text!r:.60} as {settings.dataset_column}, not a text.")
            elif text.strip():
                sha256 = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
                yield Document(f"{settings.dataset}/{number}", text, sha256)
    except TooManyCorruptRows:
        raise
    except Exception as error:  # no network, no such dataset or column: datasets raises a dozen types for these
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"Could not read {settings.dataset}: {reason}. Check the name, dataset_column and the network."
        ) from error


def _study_passages(
    settings: StudySettings, passages: Sequence[Passage], answerer: Engine, asker: Engine, *, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of a shard; everything is written together, which is what batches are for."""
    ways = [QUESTION_PROMPTS[i % len(QUESTION_PROMPTS)] for i in range(settings.questions_per_chunk)]
    written = asker.write(
        [asker.layout.prompt(way, passage.text) for passage in passages for way in ways],
        max_new_tokens=settings.max_question_tokens,
        temperature=settings.question_temperature,
        seed=seed,
    )
    texts = iter(asker.tokenizer.batch_decode(written, skip_special_tokens=True))
    questions = [list(dict.fromkeys(filter(None, (clean_question(next(texts)) for _ in ways)))) for _ in passages]
    answers = iter(
        answerer.write(
            [answerer.layout.prompt(q, p.text) for p, asked in zip(passages, questions, strict=True) for q in asked],
            max_new_tokens=settings.max_answer_tokens,
            temperature=settings.answer_temperature,
            seed=_seed(seed, "answers"),
        )
    )
    for number, (passage, asked) in enumerate(zip(passages, questions, strict=True)):
        pairs = [(question, ids) for question in asked if (ids := next(answers))]
        if not pairs:
            continue
        for (question, ids), stored in zip(pairs, answerer.top_k(passage.text, pairs, settings.top_k), strict=True):
            yield {
                "passage": number,
                "document": passage.text,
                "source": passage.document.name,
                "source_sha256": passage.document.sha256,
                "start": passage.span[0],
                "end": passage.span[1],
                "num_tokens": passage.num_tokens,
                "question": question,
                "answer": answerer.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "answer_ids": list(ids),
                "top_indices": stored.indices.ravel().tolist(),
                "top_log_probs": stored.log_probs.ravel().tolist(),
            }


def clean_question(text: str) -> str:
    """The first line that says something, without a list's number and quotation marks."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.lstrip("0123456789.)-*# ").strip("\"'“” ")


def _schema() -> Any:
    import pyarrow as pa

    whole, text = pa.int32(), pa.string()
    return pa.schema(
        [("passage", whole), ("document", text), ("source", text), ("source_sha256", text), ("start", whole)]
        + [("end", whole), ("num_tokens", whole), ("question", text), ("answer", text), ("answer_ids", pa.list_(whole))]
        + [("top_indices", pa.list_(whole)), ("top_log_probs", pa.list_(pa.float32()))]
    )


def _write_shard(path: Path, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {PROVENANCE: json.dumps(provenance).encode()}
    table = pa.Table.from_pylist(rows, schema=_schema()).replace_schema_metadata(metadata)
    with replaced(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_provenance(path: Path) -> dict[str, Any]:
    """What a shard says of itself.

    Raises:
        ValueError: it is not one, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(path).metadata[PROVENANCE])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is no complete shard of self-study ({reason}). Remove it, make it again.") from error


def _check_same(path: Path, provenance: dict[str, Any]) -> None:
    found = read_provenance(path)
    found.pop("sources")
    if found != provenance:
        differing = [key for key in provenance if found.get(key) != provenance[key]]
        if "settings" in differing:
            own, other = provenance["settings"], found["settings"]
            differing += [key for key in own if other.get(key) != own[key]]
        raise ValueError(
            f"{path} was made otherwise: {', '.join(differing)} differ. Name another output_dir, or remove its shards."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: stored token ids mean something with this one alone."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class SelfStudy:
    """Stored passages with questions and answers; a `hypernet.data.sources.Source` that is read shard by shard.

    Of the texts, a tenth each is kept for validation and test by a hash of the whole text, so that no two splits have
    passages of the same one. Each time round, shards come in another order, and `SHARDS_TOGETHER` of them are shuffled
    together: memory holds no more than these, however many there are.

    Args:
        split: "train", "validation" or "test".
        tokenizer: of the model in training; it must be the one that the answers were stored with.
        path: the folder with the shards.
        max_corrupt_rows: stored answers that may be left out because they cannot be used, of those read so far. A
            passage that has no others gives its place to the next one.

    Raises:
        ValueError: an unknown split. When reading: no shards, of several runs, of another tokenizer, with more corrupt
            rows than that, or none of their texts is in this split.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | Path,
        max_corrupt_rows: int = MAX_CORRUPT_ROWS,
    ) -> None:
        if split not in SPLITS[:3]:
            raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS[:3])}.")
        self.split = split
        self.seed = seed
        self.tokenizer = tokenizer
        self.path = Path(path)
        self.corrupt = CorruptRows(self.path, max_corrupt_rows)
        self._counted: set[int] = set()  # shards whose corrupt rows are

    def record(self, index: int) -> Record:
        place, size = self._place(index), len(self._index)
        for i in range(size):
            if (record := self._passage((place + i) % size)) is not None:
                return record
        raise ValueError(f"{self.path} has no passage that can be used. Remove its shards, make them again.")

    def _passage(self, place: int) -> Record | None:
        """None where all of its rows are corrupt."""
        shard, passage, _ = self._index[place]
        found, reasons = _read_shard(self.shards[shard])
        if reasons and shard not in self._counted:
            self._counted.add(shard)
            for reason in reasons:
                self.corrupt.skip(reason)
            self.corrupt.report(num_good=1)
        return found.get(passage)

    def num_tokens(self, index: int) -> int:
        return self._index[self._place(index)][2]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """A question about another passage. Its answer is not stored, so it needs a teacher."""
        for _ in range(1000):
            other = self._passage(rng.randrange(len(self._index)))
            if other is not None and other.document != record.document:
                return rng.choice(other.questions)._replace(answer=UNKNOWN, kind="cross_document", stored=None)
        raise ValueError(f"{self.path} has one passage, so none is asked about another. Set num_cross_document: 0.")

    @cached_property
    def shards(self) -> list[Path]:
        found = sorted(self.path.glob("shard-*.parquet"))
        if not found:
            raise ValueError(f"No shards in {self.path}. Make them: python -m hypernet.data.self_study --help.")
        first = {key: value for key, value in read_provenance(found[0]).items() if key != "sources"}
        for shard in found[1:]:
            _check_same(shard, first)
        if self.tokenizer is not None and tokenizer_fingerprint(self.tokenizer) != first["tokenizer_fingerprint"]:
            raise ValueError(
                f"{self.path} was stored with the tokenizer of {first['settings']['base_model']}, whose ids mean other "
                "tokens here. Train that base model, or make the shards with this one."
            )
        return found

    @cached_property
    def _index(self) -> list[tuple[int, int, int]]:
        """(shard, passage, tokens) of every passage of this split."""
        import pyarrow.parquet as pq

        buckets = {0: "test", 1: "validation"}
        found = {}
        for number, shard in enumerate(self.shards):
            columns = pq.read_table(shard, columns=["passage", "source_sha256", "num_tokens"]).to_pydict()
            for passage, sha256, size in zip(*columns.values(), strict=True):
                if passage is None or sha256 is None or size is None:
                    continue  # counted when the shard is read
                if buckets.get(int(sha256[:8], 16) % 10, "train") == self.split:
                    found[number, passage] = size
        if not found:
            raise ValueError(f"None of the texts in {self.path} is in the {self.split} split. Study more of them.")
        return [(*place, size) for place, size in found.items()]

    def _place(self, index: int) -> int:
        """In `_index`."""
        epoch, place = divmod(index, len(self._index))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> array:
        if epoch not in self._orders:
            rng = random.Random(f"{self.seed}/{self.split}/study/{epoch}")
            of_shard: dict[int, list[int]] = {}
            for i, (shard, _, _) in enumerate(self._index):
                of_shard.setdefault(shard, []).append(i)
            order = array("q")
            shards = rng.sample(list(of_shard), len(of_shard))
            for together in _in_groups(shards, SHARDS_TOGETHER):
                passages = [i for shard in together for i in of_shard[shard]]
                order.extend(rng.sample(passages, len(passages)))
            # The last epoch may still be asked for by a step that began in it.
            self._orders.update({epoch: order})
            for old in [e for e in self._orders if abs(e - epoch) > 1]:
                del self._orders[old]
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, array]:
        return {}


@lru_cache(maxsize=2 * SHARDS_TOGETHER)
def _read_shard(path: Path) -> tuple[dict[int, Record], tuple[str, ...]]:
    """passage → record, and what is wrong with each row that is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is damaged ({reason}). Remove it, make it again.") from error
    found: dict[int, tuple[str, list[Question]]] = {}
    reasons = []
    for number, row in enumerate(rows):
        if (wrong := _what_is_wrong(row)) is not None:
            reasons.append(f"Row {number} of {path.name} {wrong}.")
            continue
        ids = tuple(row["answer_ids"])
        indices, log_probs = (np.array(row[key]).reshape(len(ids), -1) for key in ("top_indices", "top_log_probs"))
        stored = StoredAnswer(ids, indices.astype(np.int32), log_probs.astype(np.float32))
        question = Question(row["question"], row["answer"], "document", "study", stored)
        found.setdefault(row["passage"], (row["document"], []))[1].append(question)
    records = {passage: Record((document,), tuple(questions)) for passage, (document, questions) in found.items()}
    return records, tuple(reasons)


def _what_is_wrong(row: dict[str, Any]) -> str | None:
    """Why a stored answer cannot be used; None if it can."""
    if empty := [key for key, value in row.items() if value is None or value == [] or value == ""]:
        # What the base model said may come to no text, a lone closing token.
        empty = [key for key in empty if key != "answer" or row[key] is None]
    if empty:
        return f"has no {empty[0]}"
    ids, indices, log_probs = (row[key] for key in ("answer_ids", "top_indices", "top_log_probs"))
    if None in ids or None in indices or None in log_probs:
        return "has gaps in its tokens"
    if len(indices) != len(log_probs) or len(indices) % len(ids):
        return f"has {len(indices)} tokens with {len(log_probs)} probabilities for an answer of {len(ids)} tokens"
    if min(ids) < 0 or min(indices) < 0:
        return "has a negative token"
    # A sum a little over 1 is rounding, and -inf is a token that cannot come.
    if not np.array(log_probs).max() <= 1e-3 or np.isnan(log_probs).any():
        return "has probabilities that are none"
    return None


def parse(arguments: Sequence[str]) -> StudySettings:
    """key=value ... → settings.

    Raises:
        ValueError: an argument is none, unknown, given twice, missing, or of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(StudySettings)}
    found: dict[str, Any] = {}
    for name, value in key_values(arguments, fields).items():
        kind = fields[name].type
        try:
            found[name] = kind(value)
        except ValueError:
            raise ValueError(f"{name} should be {'a whole' if kind is int else 'a'} number, got {value!r}.") from None
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in found]
    if missing:
        raise ValueError(f"{missing[0]} is missing. Write {missing[0]}=..., see --help.")
    return StudySettings(**found)


def main(arguments: Sequence[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        lines = [
            f"  {f.name + '=' + ('' if f.default is dataclasses.MISSING else str(f.default)):<27} {f.metadata['help']}"
            for f in dataclasses.fields(StudySettings)
        ]
        print(_HELP + "\n".join(lines))
        return
    silence_torchao_warnings()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for quiet in ("httpx", "datasets", "transformers"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    try:
        settings = parse(arguments)
        made = study(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"self_study: {' '.join(str(error).split())}")
    print(f"{len(made)} shards made in {settings.output_dir}; those that were there already stay.")


if __name__ == "__main__":
    main(sys.argv[1:])
