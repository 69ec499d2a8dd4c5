"""Documents: a folder's passages as memories that can be asked about, and their evidence as a teacher's prompt.

add_documents(memory, model, "notes/", Filters(user_id="alice"))         # passages, with questions about them
consolidation.consolidate(Filters(user_id="alice"), documents="notes/")  # the same, and trained on
Consolidator(evidence=Evidence(num_sentences=3))                         # in the place of whole texts
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hypernet.base.generation import context_window, decode_answer, end_ids, generate_ids
from hypernet.consolidation.questions import GIVEN_QUESTIONS, asked_keys
from hypernet.doc_to_lora import DocToLoRA
from hypernet.memory.extraction import extract_facts
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters, MemoryVersion
from hypernet.text.chunking import chunk_document
from hypernet.text.documents import Document, NoText, files_below, read_document
from hypernet.text.matching import exact_match, squad_words
from hypernet.text.sentences import split_sentences

log = logging.getLogger(__name__)

PROMPT = "Ask one question about a name, a number or a date in the text above. Give only the question."
_NUM_DRAWN = 16  # questions about a passage
_QUESTION_TOKENS = 32
_FROM_DOCUMENT = "document_sha256"  # in a passage's metadata: of the file's bytes


def add_documents(memory: Memory, model: DocToLoRA, path: str | Path, filters: Filters, *, seed: int = 0) -> list[str]:
    """Adds the passages of a file, or of the files below a folder, that can be asked about.

    A passage is as long as what one adapter is written from, at most half the base model's window; its source is the
    file's absolute path, links followed, and a text that stands in several files is one passage. Where it names no fact
    to ask for (`asked_keys`) the base model writes questions about it, which stay in the memory's metadata; where it
    cannot, the passage is left out, which the log says. What was added before stays as it is, and what a file says no
    more, or has gone with its file, holds no more.

    What was deleted or taken back stays out while its text is the same, also once it is purged: its id is a hash of its
    text and of whose it is, and `purge` keeps ids.

    Args:
        seed: of the written questions.

    Returns:
        id@version of what was added.

    Raises:
        ValueError: nothing can be read. One file of several that cannot be is a line of the log; what it said stays.
    """
    root = Path(path).expanduser().resolve()
    documents, problems = _read(root)
    found = [
        (source, passage, one.sha256)
        for source, one in documents.items()
        if one is not None
        for passage in _passages(one.text, model)
    ]
    held = {passage for _, passage, _ in found}
    earlier, ended = [one for one in memory.store.valid(filters) if _FROM_DOCUMENT in one.metadata], 0
    for one in earlier:
        source = os.path.realpath(str(one.source))
        is_gone = root in Path(source).parents and not os.path.exists(source)
        if (source in documents or is_gone) and one.text not in held:
            memory.invalidate(one.id)
            ended += 1
    if not found and not ended:
        raise ValueError(problems[0])
    for problem in problems:
        log.warning("%s It is left out.", problem)
    left_out = {one.text for one in [*earlier, *memory.store.deleted(filters)]}
    known = {one.id for one in memory.store.statements(filters)}
    added, num_left_out = list[str](), 0
    for source, passage, sha256 in found:
        if passage in left_out:
            continue
        left_out.add(passage)
        metadata: dict[str, object] = {_FROM_DOCUMENT: sha256}
        if not asked_keys(passage):
            metadata[GIVEN_QUESTIONS] = written_questions(model, passage, seed=seed)
            if not metadata[GIVEN_QUESTIONS]:
                num_left_out += 1
                continue
        identity = hashlib.sha256(json.dumps([*filters, passage]).encode()).hexdigest()[:32]
        version = None if identity in known else 1  # None: it held before, and holds again
        draft = Draft(text=passage, filters=filters, source=source, metadata=metadata, id=identity, version=version)
        added += map(str, memory.store.add([draft]))
    if num_left_out:
        log.warning("%s: %d passages are left out, since nothing can be asked about them.", path, num_left_out)
    return added


def _read(root: Path) -> tuple[dict[str, Document | None], list[str]]:
    """Absolute path → what was read, None: the file is empty; and what could not be read or is empty, a line each."""
    found, problems = dict[str, Document | None](), list[str]()
    if root.exists() and not (root.is_dir() or root.is_file()):
        raise ValueError(f"{str(root)!r} is neither a file nor a folder. Give one of them.")
    try:
        files = files_below(root) if root.is_dir() else [root]
    except NoText as error:
        files = []
        problems.append(str(error))
    for source in dict.fromkeys(os.path.realpath(file) for file in files):
        try:
            found[source] = read_document(source)
        except ValueError as error:
            problems.append(str(error))
            if isinstance(error, NoText):
                found[source] = None
    return found, problems


def _passages(text: str, model: DocToLoRA) -> Iterator[str]:
    size = min(model.max_chunk_tokens, context_window(model.base_model) // 2)
    for start, end in chunk_document(text, model.tokenizer, max_chunk_tokens=size, add_affixes=False).spans:
        if passage := text[start:end].strip():
            yield passage


def written_questions(model: DocToLoRA, passage: str, *, seed: int) -> dict[str, list[str]]:
    """Questions that the base model writes about a text: {"training": [...], "held_out": [...]}, or empty.

    One is kept if with the text in its prompt the base model answers in the text's words, and otherwise without it.
    Those with the same answer are wordings of one question: the last one is held out, the others are trained on, and
    where nothing has two wordings nothing is kept.
    """
    prompts = model.layout.prompt_ids(model.tokenizer, [PROMPT] * _NUM_DRAWN, [passage] * _NUM_DRAWN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = generate_ids(
            model.base_model, model.tokenizer, prompts, max_new_tokens=_QUESTION_TOKENS, temperature=1.0
        )
    ends = end_ids(model.base_model, model.tokenizer)
    drawn = [decode_answer(model.tokenizer, row, ends).partition("?") for row in rows]
    asked = list(dict.fromkeys(question.strip() + mark for question, mark, _ in drawn if question.strip() and mark))
    if not asked:
        return {}
    with_text, without = (model.generate(asked, documents=[text] * len(asked)) for text in (passage, None))
    words, wordings = f" {' '.join(squad_words(passage))} ", dict[str, list[str]]()
    for question, answer, other in zip(asked, with_text, without, strict=True):
        said = " ".join(squad_words(answer))
        if said and f" {said} " in words and not exact_match(other, answer):
            wordings.setdefault(said, []).append(question)
    held_out = [several[-1] for several in wordings.values() if len(several) > 1]
    training = [one for several in wordings.values() for one in several if one not in held_out]
    return {"training": training, "held_out": held_out} if held_out else {}


class Evidence:
    """A text's evidence on a question, the best first, and its facts as (subject; relation; object).

    A sentence's score is the sum over the question's words in it of log((n + 1) / n_w), for n sentences in the text,
    n_w of which have the word. Without a fact in the text, a memory's own key stands with its best sentence.

    Args:
        num_sentences: at most.

    Raises:
        ValueError: num_sentences is below 1.

    Source: Chen et al. 2025, https://arxiv.org/abs/2506.01954, where a language model writes and ranks both.
    """

    def __init__(self, *, num_sentences: int = 3) -> None:
        if num_sentences < 1:
            raise ValueError(f"num_sentences is {num_sentences}. Give at least 1.")
        self.num_sentences = num_sentences

    def prompt(self, question: str, memory: MemoryVersion) -> str:
        """What stands in the teacher's prompt in the place of the memory's text."""
        text = str(memory.text)
        sentences = [text[start:end].strip() for start, end in split_sentences(text)]
        words = [set(squad_words(sentence)) for sentence in sentences]
        scores = [
            sum(
                math.log((len(sentences) + 1) / sum(word in other for other in words))
                for word in sorted(own & set(squad_words(question)))
            )
            for own in words
        ]
        ranked = sorted(range(len(sentences)), key=lambda place: -scores[place])
        triples = [(fact.subject, fact.relation, fact.object) for fact in extract_facts(text)]
        if not triples and memory.subject is not None and memory.relation is not None:
            triples = [(memory.subject, memory.relation, sentences[ranked[0]])]
        evidence = [sentences[place] for place in ranked[: self.num_sentences]]
        return "\n".join([*evidence, *(f"({'; '.join(triple)})" for triple in triples)])
