"""What do edits of known facts change, one after the other? `python -m benchmarks.forgetting.editing`

A fact that the base model knows (p >= .5) gets a value that another subject has; n = 1, 8, 64, 256 in a row. Asked is

reliability    the edited question: the new value
paraphrase     wordings that no method is shown: the new value
neighbourhood  the same of other subjects: what it was
subject        other facts on the same subject: what it was
reverse        whose the new value is: the subject is likelier than each of the decoys

by whether greedy decoding writes exactly that answer. Controls: no edit, a random change of rank 1 as large as ROME's
for each edit, the new fact in the prompt. A cell is an arm at a seed, one file; cells that are there are skipped.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.measuring.rows import Row, Rows, rounded, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Number, OutputFile, OutputFolder, Settings, Text

METRICS = ("reliability", "paraphrase", "neighbourhood", "subject", "reverse")
# In the order of the tables; an editor's name is its key in conf/forgetting_editing.yaml.
ARMS = (
    *("no_edit", "in_prompt", "random_rank_one", "rome", "rome_bounded", "memit", "memit_at_once", "alphaedit"),
    *("adapter", "adapter_routed", "consolidation", "rehearsal"),
)
OURS = "adapter"
# What no cell depends on.
_NOT_IDENTITY = ("arms", "seeds", "output", "output_dir", "threads", "editors", "consolidation")


class EditingSettings(Settings):
    checkpoint: Text
    arms: list[Text]
    seeds: list[Number]
    sizes: list[Count]
    num_sequences: dict[int, Count]
    num_measured: Count
    num_neighbours: Count
    num_decoys: Count
    num_articles: Count
    statements: dict[str, str]
    editors: dict[str, Any]
    edits_at_once: dict[str, Count | None]
    max_steps: Count
    batch_size: Count
    lr: Above0
    rehearsal: dict[str, Any]
    moments_dir: OutputFolder
    output_dir: OutputFolder
    output: OutputFile | None
    threads: Count


SCRIPT = Script("benchmarks.forgetting.editing", EditingSettings)


class Bench:
    """The model, C's texts and the arms, made once for all cells."""

    def __init__(self, cfg: EditingSettings) -> None:
        import torch

        from hypernet.consolidation.editing.moments import KeyMoments
        from hypernet.data.encyclopedia import Encyclopedia
        from hypernet.doc_to_lora import DocToLoRA

        torch.set_num_threads(cfg.threads)
        self.cfg = cfg
        self._changes: dict[int, list[Any]] = {}
        # bfloat16 rounds away what an edit moves.
        self.model = DocToLoRA.from_pretrained(cfg.checkpoint).float().eval().requires_grad_(False)
        # Of other subjects and values than the facts: no name of the split "train" is one of "known".
        train = Encyclopedia("train")
        records = [train.record(place) for place in range(cfg.num_articles)]
        self.moments = KeyMoments(
            [record.document for record in records],
            questions=[question.text for record in records for question in record.questions],
            folder=cfg.moments_dir,
        )

    def changes(self, seed: int) -> list[Any]:
        """The same for all arms of a seed."""
        from benchmarks.forgetting.editing_arms import draw

        if seed not in self._changes:
            cfg = self.cfg
            numbers = {"num_neighbours": cfg.num_neighbours, "num_decoys": cfg.num_decoys}
            drawn = draw(self.model, max(cfg.sizes), seed=seed, statements=cfg.statements, **numbers)
            self._changes = {seed: drawn}
        return self._changes[seed]

    def arm(self, name: str, seed: int) -> Any:
        """The class of an arm.

        Raises:
            ValueError: the control's norms are not measured yet.
        """
        from benchmarks.forgetting import editing_arms as made
        from hypernet.consolidation.rehearsal import NoRehearsal

        cfg = self.cfg
        if name in cfg.editors:
            editor = instantiate(cfg.editors[name], _convert_="all")(moments=self.moments)
            return made.InARow(editor, batch_size=cfg.edits_at_once.get(name, 1))
        night = {"max_steps": cfg.max_steps, "batch_size": cfg.batch_size, "lr": cfg.lr}
        match name:
            case "no_edit":
                return made.NoEdit()
            case "in_prompt":
                return made.InPrompt()
            case "adapter" | "adapter_routed":
                return made.Internalized(join="route" if name == "adapter_routed" else None)
            case "consolidation":
                return made.Consolidated(NoRehearsal(), **night)
            case "rehearsal":
                return made.Consolidated(instantiate(cfg.rehearsal, _convert_="all"), **night)
            case _:
                return made.RandomRankOne(self._norms_of_rome(seed))

    def _norms_of_rome(self, seed: int) -> dict[str, list[dict[str, float]]]:
        path = cell_of(self.cfg, "rome", seed)
        if not path.is_file():
            raise ValueError("random_rank_one makes changes as large as ROME's. Put rome before it in arms.")
        found: dict[str, list[dict[str, float]]] = {}
        for row in read_cell(path):
            if row["kind"] == "sequence":
                # The longest of a sequence's sizes comes last.
                found[row["first"]] = row["norms"]
        return found

    def rows(self, name: str, seed: int) -> Iterator[Row]:
        """Of a cell."""
        import torch

        from hypernet.base.base_model import fingerprint

        cfg, arm, changes = self.cfg, self.arm(name, seed), self.changes(seed)
        own = fingerprint(self.model.base_model, exact=True)
        for place, (part, sizes) in enumerate(sequences(changes, cfg.sizes, cfg.num_sequences)):
            started = time.process_time()
            learning = arm.learn(self.model, part, sizes=sizes, seed=seed)
            for size, learned in learning:
                seconds = time.process_time() - started
                labels = {"arm": name, "seed": seed, "n": size, "sequence": place}
                with torch.no_grad():
                    yield from ({**labels, **row} for row in self._measured(learned, part[:size]))
                undone = fingerprint(self.model.base_model, exact=True) == own
                yield {
                    **{"kind": "sequence", **labels, "first": part[0].known.questions[0], "undone": undone},
                    **{"processor_s": seconds, "steps": learned.steps, "norms": [dict(one) for one in learned.norms]},
                    "total_norm": _total_norm(self.model, learned.tensors),
                }
                started = time.process_time() - seconds

    def _measured(self, learned: Any, changes: Sequence[Any]) -> Iterator[Row]:
        """A row for each of the changes, or for so many of them, evenly spaced from the first to the last."""
        from benchmarks.forgetting.editing_arms import Asked

        chosen = evenly(len(changes), self.cfg.num_measured)
        asked: list[Asked] = []
        parts: list[tuple[int, str]] = []  # place among the changes, metric

        def ask(place: int, metric: str, question: str, answer: str) -> None:
            asked.append(Asked(question, answer, changes[place]))
            parts.append((place, metric))

        for place in chosen:
            change = changes[place]
            ask(place, "reliability", change.edit.question, change.answer)
            for text in change.paraphrases:
                ask(place, "paraphrase", text, change.answer)
            for metric, facts in (("neighbourhood", change.neighbours), ("subject", change.others)):
                for fact in facts:
                    ask(place, metric, fact.questions[0], fact.answer)
            for subject in (change.known.subject, *change.decoys):
                ask(place, "reverse", change.reverse, subject)
        found: dict[tuple[int, str], list[tuple[bool, float]]] = {}
        for key, answer in zip(parts, learned.answers(self.model, asked), strict=True):
            found.setdefault(key, []).append(answer)
        for place in chosen:
            row: Row = {"kind": "fact", "place": place, "relation": changes[place].known.relation}
            for metric in METRICS:
                if answers := found.get((place, metric)):
                    scores = [float(hit) for hit, _ in answers]
                    if metric == "reverse":
                        (_, right), *wrong = answers
                        scores = [float(all(right > other for _, other in wrong))]
                    row[metric] = fmean(scores)
            yield row


def _total_norm(model: Any, tensors: Mapping[str, Any]) -> float:
    """Frobenius norm of all that changed in the base model."""
    parts = (tensor.double() - model.base_model.get_parameter(name).double() for name, tensor in tensors.items())
    return float(sum(float(part.square().sum()) for part in parts) ** 0.5)


def evenly(number: int, wanted: int) -> list[int]:
    """At most so many places of a list, the first and the last among them."""
    if number <= wanted:
        return list(range(number))
    return [round(i * (number - 1) / max(1, wanted - 1)) for i in range(wanted)]


def sequences(
    changes: Sequence[Any], sizes: Sequence[int], num_sequences: Mapping[int, int]
) -> list[tuple[list[Any], list[int]]]:
    """Changes made in a row and after how many it is measured: all of them once, and other ones for small sizes."""
    found = [(list(changes), sorted(sizes))]
    for size in sorted(sizes):
        for number in range(1, num_sequences.get(size, 1)):
            part = list(changes[number * size : (number + 1) * size])
            if len(part) == size:
                found.append((part, [size]))
    return found


def cell_of(cfg: EditingSettings, arm: str, seed: int) -> Path:
    from benchmarks.measuring.cells import cell_path, identity_of

    config = {key: value for key, value in cfg.model_dump().items() if key not in _NOT_IDENTITY}
    config |= {"arm": arm, "editor": cfg.editors.get("rome" if arm == "random_rank_one" else arm)}
    return cell_path(
        cfg.output_dir, task="editing", method=arm, seed=seed, identity=identity_of(config, cfg.checkpoint)
    )


def read_cell(path: Path) -> list[Row]:
    from benchmarks.measuring.rows import read_rows

    return read_rows(path)


def measure(cfg: EditingSettings) -> Iterator[Row]:
    """A row for each finished cell; then the summaries."""
    from benchmarks.measuring.cells import write_cell

    bench: Bench | None = None
    cells: list[Row] = []
    for seed in cfg.seeds:
        for arm in sorted(cfg.arms, key=_order):
            path = cell_of(cfg, arm, seed)
            if skipped := path.is_file():
                found = read_cell(path)
            else:
                bench = bench or Bench(cfg)
                found = [rounded(row) for row in bench.rows(arm, seed)]
                write_cell(path, found)
            cells += found
            done = [row for row in found if row["kind"] == "sequence"]
            seconds = sum(row["processor_s"] for row in done if row["n"] == max(cfg.sizes))
            yield {"kind": "cell", "arm": arm, "seed": seed, "was_there": skipped, "processor_s": seconds}
    yield from summaries(cells)


def _order(arm: str) -> int:
    # The control takes its norms from ROME's cell.
    return ARMS.index(arm) + (100 if arm == "random_rank_one" else 0)


def summaries(cells: Rows) -> Iterator[Row]:
    """Of each arm and size: each metric's mean with a 95 % interval over seeds and facts, its lowest and highest seed,
    and the paired difference from the adapter on the same facts."""
    from benchmarks.measuring.metrics import bootstrap_interval, paired_interval

    facts = [row for row in cells if row["kind"] == "fact"]
    for arm in dict.fromkeys(row["arm"] for row in facts):
        for size in sorted({row["n"] for row in facts}):
            own = {_key(row): row for row in facts if row["arm"] == arm and row["n"] == size}
            ours = {_key(row): row for row in facts if row["arm"] == OURS and row["n"] == size}
            done = [row for row in cells if row["kind"] == "sequence" and row["arm"] == arm and row["n"] == size]
            row: Row = {
                **{"kind": "summary", "arm": arm, "n": size, "facts": len(own), "sequences": len(done)},
                **{"undone": all(one["undone"] for one in done), "total_norm": fmean(o["total_norm"] for o in done)},
                "processor_s": fmean(one["processor_s"] for one in done),
            }
            for metric in METRICS:
                scores = {key: one[metric] for key, one in own.items() if metric in one}
                if not scores:
                    continue
                of_seeds = [
                    fmean(score for key, score in scores.items() if key[0] == seed)
                    for seed in {key[0] for key in scores}
                ]
                row[metric] = {"mean": fmean(scores.values()), "lowest": min(of_seeds), "highest": max(of_seeds)}
                if len(scores) > 1:
                    row[metric]["interval"] = list(bootstrap_interval(list(scores.values()), groups=list(scores)))
                both = [key for key in scores if key in ours]
                if both and arm != OURS:
                    columns = [[scores[key] for key in both], [ours[key][metric] for key in both]]
                    interval = paired_interval(columns, lambda one, other: one - other, groups=both)
                    mean = fmean(columns[0]) - fmean(columns[1])
                    row[metric]["minus_adapter"] = {"mean": mean, "interval": interval and list(interval)}
            yield row


def _key(row: Row) -> tuple[int, int, int]:
    return row["seed"], row["sequence"], row["place"]


@hydra.main(config_path="../../conf", config_name="forgetting_editing", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        if unknown := sorted(set(settings.arms) - set(ARMS)):
            raise ValueError(f"There is no arm {unknown[0]!r}: choose of {', '.join(ARMS)}.")
        show_and_write(measure(settings), settings.output, config=plain(cfg))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/forgetting_editing.yaml")
