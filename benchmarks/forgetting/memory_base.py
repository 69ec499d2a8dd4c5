"""A base model that uses its memory layer, for methods that move slots: `python -m benchmarks.forgetting.memory_base`

A memory of product keys takes the place of one MLP. First it alone learns that MLP's outputs, then everything learns

    KL(base model ‖ this one)

at the questions that the base model answers by itself, with an article in its prompt, and about names that nobody told.
Trained beside the MLP, as in `experiment=tiny_memory_layer`, a memory is hardly used: the MLPs know everything already.

kind: base, alone, healed, without (the healed one with all values 0), each with what it answers of three kinds
"""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from torch import Tensor

from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Number, OutputFolder, Settings, Text


class MemoryBaseSettings(Settings):
    checkpoint: Text
    memory_layer: dict[str, Any]
    seed: Number
    steps_alone: Number
    steps_healed: Number
    lr_alone: Above0
    lr_healed: Above0
    lr_memory: Above0
    num_questions: Count
    num_unknown: Count
    num_articles: Count
    output_dir: OutputFolder


SCRIPT = Script("benchmarks.forgetting.memory_base", MemoryBaseSettings)

_RECORDS = 300
_MEASURED = 200


def rows(cfg: MemoryBaseSettings) -> Iterator[Row]:
    """Trains the checkpoint's base model in place, and writes it with its tokenizer to `output_dir`."""
    from benchmarks.forgetting import protocol
    from hypernet.base.product_keys import add_memory_layer
    from hypernet.base.targets import find_blocks
    from hypernet.data.encyclopedia import Encyclopedia, background_questions
    from hypernet.training.lit_base_model import save_base_model

    torch.set_num_threads(1)
    model = protocol.load(cfg.checkpoint)
    base_model, teacher = model.base_model, copy.deepcopy(model.base_model)
    train, validation = Encyclopedia("train"), Encyclopedia("validation")
    records = [train.record(place) for place in range(2 * _RECORDS)]
    known = [(q.text, q.answer, None) for q in background_questions()]
    unknown = [(one.questions[0].text, protocol.UNKNOWN, None) for one in records[_RECORDS:]]
    read = [(q.text, q.answer, one.document) for one in records[:_RECORDS] for q in one.questions]
    others = [validation.record(place) for place in range(_MEASURED)]
    asked = {
        "background": random.Random(cfg.seed).sample(known, _MEASURED),
        "in_context": [(one.questions[0].text, one.questions[0].answer, one.document) for one in others],
        "abstention": [(one.questions[0].text, protocol.UNKNOWN, None) for one in others],
    }

    def measured(kind: str) -> Row:
        found = {name: protocol.rightly(model, protocol.State(), _rows(model, part)) for name, part in asked.items()}
        return {"kind": kind, **{name: sum(right or []) / _MEASURED for name, right in found.items()}}

    def batches(step: int) -> list[Any]:
        rng = random.Random(f"{cfg.seed}/{step}")
        alone = rng.sample(known, cfg.num_questions) + rng.sample(unknown, cfg.num_unknown)
        return [_rows(model, alone), _rows(model, rng.sample(read, cfg.num_articles))]

    yield measured("base")
    memory = add_memory_layer(base_model, cfg.memory_layer, seed=cfg.seed)
    own = list(memory.requires_grad_(True).parameters())
    decoder, name = find_blocks(teacher)
    mlp, seen = getattr(decoder, name)[cfg.memory_layer["layer"]].mlp, {}
    hook = mlp.register_forward_hook(lambda _mlp, args, output: seen.update(x=args[0], y=output))
    optimizer = torch.optim.AdamW(own, lr=cfg.lr_alone, weight_decay=0.0)
    for step in range(cfg.steps_alone):
        loss = torch.zeros(())
        for part in batches(step):
            with torch.no_grad():
                teacher(input_ids=part.ids, use_cache=False)
            x, y = (seen[key][part.segments >= 0] for key in "xy")
            loss = loss + (memory(x) - y).square().sum() / y.square().sum()
        _stepped(optimizer, loss)
    hook.remove()
    yield measured("alone")
    inside = {*own}
    rest = [parameter for parameter in base_model.requires_grad_(True).parameters() if parameter not in inside]
    groups = [{"params": rest, "lr": cfg.lr_healed}, {"params": own, "lr": cfg.lr_memory}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=max(1, cfg.steps_healed))
    for step in range(cfg.steps_healed):
        loss = torch.zeros(())
        for part in batches(cfg.steps_alone + step):
            with torch.no_grad():
                wanted = _log_p(teacher, part)
            loss = loss + (wanted.exp() * (wanted - _log_p(base_model, part))).sum(-1).mean()
        _stepped(optimizer, loss)
        falling.step()
    base_model.requires_grad_(False)
    yield measured("healed")
    save_base_model(base_model, model.tokenizer, cfg.output_dir)
    memory.values.zero_()
    yield measured("without")


def _rows(model: Any, asked: list[tuple[str, str, str | None]]) -> Any:
    from benchmarks.forgetting.protocol import answer_rows

    questions, answers, documents = zip(*asked, strict=True)
    return answer_rows(model, questions, answers, documents)


def _log_p(base_model: Any, rows: Any) -> Tensor:
    return base_model(input_ids=rows.ids, use_cache=False).logits[rows.segments >= 0].float().log_softmax(-1)


def _stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@hydra.main(config_path="../../conf", config_name="forgetting_memory_base", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        show_and_write(rows(settings), None, config=plain(cfg))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/forgetting_memory_base.yaml")
