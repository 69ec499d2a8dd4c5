"""Pooled learning and what it tells of one user: `python -m benchmarks.use.private`

Every user knows some of a few facts that many know, and one secret number of its own, its canary. Trained on all of
them with a bound on epsilon, do the weights answer the common facts, and do they tell whose canary was there? Other
canaries of the same kind were nobody's. The attacker knows a canary with the questions that it was trained by, and goes
by how much likelier training made its answers (`auc`), or by how likely they are afterwards (`auc_likelihood`); the
area under the curve over members and others says how well that works.

The same attack on generated adapters, of which nothing was trained on a canary: each user's own adapter, and the sum of
the users' adapters, each clipped as a change of weights, with Gaussian noise.

kind       one row for
before     a seed: the base model
weights    a mechanism, an epsilon (null: no noise), a learning rate and a seed
adapters   `own`, or `pooled` with an epsilon, and a seed
masks      a seed: sums by masks against plain ones

At the first seed all learning rates are tried; the others take the one at which the first had the highest log p of the
common answers. What that search spends is not in epsilon.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra

from benchmarks.forgetting.sweep import Cell, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Above0, Count, Number, OutputFile, OutputFolder, Settings, Text

ACCOUNTANTS = ("opacus", "renyi")


class PrivateSettings(Settings):
    checkpoint: Text
    seeds: list[Number]
    num_users: Count
    num_common: Count
    common_per_user: Count
    wordings: Count
    mechanisms: list[Text]
    epsilons: list[Above0 | None]
    delta: Above0
    accountant: Text
    learning_rates: list[Above0]
    pooled: dict[str, Any]
    num_adapters: Number
    adapter_clip: Above0
    adapter_scale: Above0
    num_masked: Number
    cells: OutputFolder
    output: OutputFile | None


SCRIPT = Script("benchmarks.use.private", PrivateSettings)


class Pool(NamedTuple):
    """common: facts that many know. members: each user's canary, by the user's place; others: nobody's. lessons: of the
    users. texts: what each user was told, sentences."""

    common: Sequence[Any]
    members: Sequence[Any]
    others: Sequence[Any]
    lessons: Mapping[str, Sequence[Any]]
    texts: Sequence[Sequence[str]]


def draw_pool(seed: int, settings: Mapping[str, Any]) -> Pool:
    """Raises ValueError where there are fewer canaries than asked for."""
    from benchmarks.forgetting.protocol import new_facts, new_numbers
    from hypernet.consolidation.consolidator import Lesson

    number, wordings = settings["num_users"], settings["wordings"]
    common = new_facts(seed, settings["num_common"])
    canaries = list({one.subject: one for one in new_numbers(seed, 2 * number + number // 4 + 4)}.values())
    if len(canaries) < 2 * number:
        raise ValueError(f"There are {len(canaries)} canaries for {number} users and as many others. Take fewer users.")
    members, others = canaries[:number], canaries[number : 2 * number]
    rng = random.Random(f"pool/{seed}")
    lessons, texts = {}, []
    for place, canary in enumerate(members):
        known = rng.sample(common, min(settings["common_per_user"], len(common)))
        texts.append([one.text for one in (*known, canary)])
        lessons[f"user-{place:04}"] = [
            Lesson(question, None, one.answer) for one in (*known, canary) for question in one.training[:wordings]
        ]
    return Pool(common, members, others, lessons, texts)


def accountant_of(name: str) -> Any:
    """ValueError if it is unknown, or opacus is not installed."""
    from hypernet.consolidation.private.accounting import OpacusAccountant, RenyiAccountant

    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant is {name!r}. Choose {' or '.join(ACCOUNTANTS)}.")
    return OpacusAccountant("rdp") if name == "opacus" else RenyiAccountant()


def measure_cell(cell: Cell) -> list[Row]:
    """All rows of one seed."""
    import torch

    from benchmarks.forgetting.protocol import load

    torch.set_num_threads(1)
    settings, seed = cell.settings, cell.seed
    model, pool = load(settings["checkpoint"]), draw_pool(seed, settings)
    return [
        *_weights(model, pool, settings, seed),
        *_adapters(model, pool, settings, seed),
        *_masks(settings, seed),
    ]


def _weights(model: Any, pool: Pool, settings: Mapping[str, Any], seed: int) -> Iterator[Row]:
    from hypernet.consolidation.private.gradients import UserGradients
    from hypernet.consolidation.private.membership import area_under_curve, likelihood_gains
    from hypernet.consolidation.private.pooled import PooledConsolidator, read_pairs

    common = [(one.asked, one.answer) for one in pool.common]
    wordings, number = settings["wordings"], len(pool.members)
    secrets = [*pool.members, *pool.others]
    canaries = [(question, one.answer) for one in secrets for question in one.training[:wordings]]
    gradients = UserGradients(model, rank=settings["pooled"]["rank"], seed=seed)
    asked, attacked = (read_pairs(model, gradients, pairs) for pairs in (common, canaries))

    def likelihoods(theta: Any) -> list[float]:
        """Of each canary, the sum over its questions."""
        found = gradients.log_likelihoods(theta, attacked)
        return [sum(found[start : start + wordings]) for start in range(0, len(found), wordings)]

    before = likelihoods(gradients.start())

    def measured(theta: Any) -> Row:
        after = likelihoods(theta)
        gains = likelihood_gains(after, before)
        right = [float(one) for one in gradients.rightly(theta, asked)]
        log_p = gradients.log_likelihoods(theta, asked)
        members, others = gains[:number], gains[number:]
        return {
            **{"exact_match": _mean(right), "log_p": _mean(log_p), "auc": area_under_curve(members, others)},
            **{"gain_members": _mean(members), "gain_others": _mean(others)},
            "auc_likelihood": area_under_curve(after[:number], after[number:]),
            "items": {"common": right, "members": members, "others": others, "after": after},
        }

    yield {"kind": "before", **measured(gradients.start())}
    accountant = accountant_of(settings["accountant"])
    for mechanism in settings["mechanisms"]:
        for epsilon in settings["epsilons"]:
            for lr in settings["rates"][arm_name(mechanism, epsilon)]:
                pooled = PooledConsolidator(
                    epsilon=epsilon or math.inf,
                    delta=settings["delta"],
                    mechanism=mechanism,
                    lr=lr,
                    accountant=accountant,
                    seed=seed,
                    **settings["pooled"],
                )
                trained = pooled.train(model, pool.lessons)
                spent = {
                    **{"epsilon": epsilon, "spent": None if epsilon is None else trained.epsilon},
                    **{"delta": settings["delta"], "noise": trained.noise, "lr": lr, "clipped": trained.clipped},
                }
                yield {
                    **{"kind": "weights", "mechanism": mechanism, **spent, **measured(trained.theta)},
                    **{"loss": _mean(trained.losses[-5:]), "seconds": trained.seconds},
                }


def _adapters(model: Any, pool: Pool, settings: Mapping[str, Any], seed: int) -> Iterator[Row]:
    import torch

    from benchmarks.forgetting.protocol import State, scores
    from hypernet.consolidation.private.accounting import Spending, noise_for
    from hypernet.consolidation.private.membership import area_under_curve, likelihood_gains
    from hypernet.consolidation.private.pooled import clipped
    from hypernet.consolidation.weights import MovedWeights, installed

    number = min(settings["num_adapters"], len(pool.members))
    if not number:
        return
    told = list(dict.fromkeys(text for texts in pool.texts[:number] for text in texts))
    generated = model.internalize(told)
    chunks = {text: range(*span) for text, span in zip(told, generated.chunk_spans(), strict=True)}
    adapters = [
        generated.of_chunks(sorted(chunk for text in texts for chunk in chunks[text])).fused()
        for texts in pool.texts[:number]
    ]
    canaries = [*pool.members[:number], *pool.others[:number]]
    questions, answers = [one.asked for one in canaries], [one.answer for one in canaries]
    before = model.log_likelihoods(questions, answers)

    def attacked(after: Sequence[float]) -> Row:
        gains = likelihood_gains(after, before)
        members, others = gains[:number], gains[number:]
        return {
            **{"auc": area_under_curve(members, others), "gain_members": _mean(members), "gain_others": _mean(others)},
            "auc_likelihood": area_under_curve(after[:number], after[number:]),
            "items": {"members": members, "others": others, "after": list(after)},
        }

    common = [one for one in pool.common if any(one.text in texts for texts in pool.texts[:number])]
    # Its own canary, and one that nobody has, of each user's adapter; and what the user knows of the common facts.
    owned = [
        (one, adapter)
        for texts, adapter in zip(pool.texts[:number], adapters, strict=True)
        for one in common
        if one.text in texts
    ]
    said = model.generate([one.asked for one, _ in owned], [adapter for _, adapter in owned], max_new_tokens=16)
    right = [float(text == one.answer) for text, (one, _) in zip(said, owned, strict=True)]
    after = model.log_likelihoods(questions, answers, [*adapters, *adapters])
    yield {"kind": "adapters", "release": "own", "epsilon": None, "exact_match": _mean(right), **attacked(after)}

    weights = [MovedWeights.of_adapter(model.base_model, adapter).tensors for adapter in adapters]
    names = list(weights[0])
    base = {name: model.base_model.get_parameter(name).detach() for name in names}
    changes = torch.stack([torch.cat([(own[name] - base[name]).flatten() for name in names]) for own in weights])
    limited = clipped(changes, settings["adapter_clip"])
    accountant = accountant_of(settings["accountant"])
    for epsilon in settings["epsilons"]:
        total, noise = limited.sum(0), 0.0
        if epsilon is not None:
            noise = noise_for(epsilon, Spending(1.0, 1, 1.0), accountant, delta=settings["delta"])
            drawn = torch.randn(total.shape, generator=torch.Generator().manual_seed(seed))
            total = total + noise * settings["adapter_clip"] * drawn
        parts = (settings["adapter_scale"] * total).split([base[name].numel() for name in names])
        tensors = {name: base[name] + part.view_as(base[name]) for name, part in zip(names, parts, strict=True)}
        found = scores(model, State(tensors), common)
        with installed(model.base_model, tensors):
            after = model.log_likelihoods(questions, answers)
        lengths = changes.norm(dim=1)
        yield {
            **{"kind": "adapters", "release": "pooled", "epsilon": epsilon, "noise": noise},
            **{"exact_match": _mean(found), **attacked(after)},
            **{"clipped": _mean((lengths > settings["adapter_clip"]).float().tolist())},
            **{"length": _mean(lengths.tolist()), "delta": settings["delta"]},
        }


def _masks(settings: Mapping[str, Any], seed: int) -> Iterator[Row]:
    """Masked sums of random vectors against plain ones, and how much an upload tells of its vector."""
    import time

    import numpy as np

    from hypernet.consolidation.private.secure_sum import SecureSum

    if not (number := settings["num_masked"]):
        return
    rng, size = np.random.default_rng(seed), 4096
    vectors = {f"user-{place}": rng.normal(size=size) for place in range(number)}
    secure = SecureSum(size=size, seed=seed)
    started = time.perf_counter()
    uploads = {name: secure.upload(vector, name, list(vectors)) for name, vector in vectors.items()}
    dropped = {name: words for name, words in uploads.items() if name != "user-0"}
    whole, rest = (secure.total(some, list(vectors)) for some in (uploads, dropped))
    seconds = time.perf_counter() - started
    words = sum(secure.encoded(vector, parts=number) for vector in vectors.values())
    plain_rest = sum(vector for name, vector in vectors.items() if name in dropped)
    told = [
        abs(float(np.corrcoef(uploads[name].view(np.int64).astype(float), vector)[0, 1]))
        for name, vector in vectors.items()
    ]
    yield {
        **{"kind": "masks", "users": number, "size": size, "seconds": seconds, "correlation": max(told)},
        "differing": int((whole != words.view(np.int64) / 2.0**secure.fraction_bits).sum()),
        "error": float(np.abs(rest - plain_rest).max()),
    }


def arm_name(mechanism: str, epsilon: float | None) -> str:
    return f"{mechanism}/{'inf' if epsilon is None else f'{epsilon:g}'}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rows(cfg: PrivateSettings) -> Iterator[Row]:
    """All rows: the first seed's, then those of the others at the learning rates that it chose."""
    common = cfg.model_dump(exclude={"seeds", "cells", "output", "learning_rates"})
    arms = [arm_name(mechanism, epsilon) for mechanism in cfg.mechanisms for epsilon in cfg.epsilons]
    first, *others = cfg.seeds
    tried = {arm: list(cfg.learning_rates) for arm in arms}
    found = list(_cells([first], {**common, "rates": tried}, cfg))
    yield from found
    taken = {}
    for arm in arms:
        own = [r for r in found if r["kind"] == "weights" and arm_name(r["mechanism"], r["epsilon"]) == arm]
        taken[arm] = [max(own, key=lambda row: row["log_p"])["lr"]]
    yield from _cells(others, {**common, "rates": taken}, cfg)


def _cells(seeds: Sequence[int], settings: Mapping[str, Any], cfg: PrivateSettings) -> Iterator[Row]:
    cells = [Cell("private", "pooled", seed, settings) for seed in seeds]
    return run_cells(cells, measure_cell, folder=cfg.cells, workers=1)


@hydra.main(config_path="../../conf", config_name="use_private", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        accountant_of(settings.accountant)
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/use_private.yaml")
