"""LastBlock: a LoRA of the last block's down projection, on what the base model has read once.

block = LastBlock(model)
read = block.read([(prompt, answer)])                  # one pass of the base model, where it predicts answers
block.log_p(read, lora)                                # log p of each row's answer, [rows], differentiable
block.adapter(lora, name="ada")                        # a LoRAAdapter, for block.injector() and for PEFT

Nothing in front of this projection depends on the LoRA, so that training and asking cost a norm and a head. Unlike
`UserGradients`, both factors train.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.injection import LoRAInjector
from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows, shared_beginning
from hypernet.base.targets import find_blocks, find_targets
from hypernet.consolidation.persona.character import PersonaLine
from hypernet.consolidation.private.gradients import Reading
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.chat import user_text
from hypernet.text.tokens import framed_ids, text_ids

_TOGETHER = 16  # prompts in a row


class Factors(NamedTuple):
    """A [R, d_in] and B [R, d_out] of a LoRA; the projection's output changes by x Aᵀ B.

    Or of C LoRAs, [C, R, d_in] and [C, R, d_out], for as many equal parts of the rows, one after another.
    """

    A: Tensor
    B: Tensor


class Shared(NamedTuple):
    """What a persona leaves alone: directions [K, d_in], orthonormal; scale: of what is left, one over its rms.

    The first is the mean of inputs where the character answers: of SmolLM2's, where it says yes or no, it is twelve
    times as long as what tells two statements apart, and a LoRA trained on them as they are moves all answers alike
    first. The others are where other text lies, so that a LoRA without them does little to it.

    Source: a null space of what is kept: Fang et al. 2024, https://arxiv.org/abs/2410.02355
    """

    directions: Tensor
    scale: float

    @classmethod
    def of(cls, inputs: Tensor, others: Tensor | None = None, *, number: int = 0) -> Self:
        """Of inputs [N, d_in], and the first `number` directions of others [M, d_in] by their second moment."""
        mean = inputs.mean(0)
        found = mean[None]
        if others is not None and number:
            _, _, rows = torch.linalg.svd(others, full_matrices=False)
            found = torch.cat([found, rows[:number]])
        directions = torch.linalg.qr(found.T).Q.T
        left = inputs - inputs @ directions.T @ directions
        return cls(directions, float(1 / left.square().mean().sqrt().clamp(min=1e-12)))

    def removed(self, inputs: Tensor) -> Tensor:
        """scale (x - UᵀU x), over the last axis. Symmetric: a LoRA of it is one of x with the same map on A's rows."""
        return self.scale * (inputs - inputs @ self.directions.T @ self.directions)


class LastBlock:
    """Of one base model; its final norm and head are computed in float32.

    Raises:
        ValueError: there is no such module, or no final `norm` behind it.
    """

    def __init__(self, model: DocToLoRA, *, module: str = "down_proj") -> None:
        decoder, blocks = find_blocks(model.base_model)
        self.targets = tuple(find_targets(model.base_model, [module], layers=[len(getattr(decoder, blocks)) - 1]))
        (self.place,) = self.targets[0].modules()
        norm = getattr(decoder, "norm", None)
        if not isinstance(norm, nn.Module):
            raise ValueError(f"{type(decoder).__name__} has no final `norm`, in front of which a persona works.")
        self.model, self._norm = model, norm
        self._head: Tensor = model.base_model.get_output_embeddings().weight.detach().float()

    def answer_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many each text is, as an answer's beginning."""
        frame = self.model.layout.before_answer
        return [len(ids) for ids in framed_ids(self.model.tokenizer, [(frame, text, "") for text in texts])]

    def answer_directions(self, chosen: Tensor, others: Tensor, *, rank: int) -> Tensor:
        """Where log p of these tokens [N] and of others [N], in pairs, are told apart in front of the norm, while the
        other tokens' logits part least: C⁻¹ (e - e'), C the covariance of the head's rows e.

        Returns:
            [R, d_out], orthonormal, R at most `rank`: of yes and no it is one direction.
        """
        rows = self._head * self._norm.get_parameter("weight").detach().float()
        covariance = torch.cov(rows.T)
        covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        apart: Tensor = torch.linalg.solve(covariance, (rows[chosen] - rows[others]).T).T
        values, found = torch.linalg.svd(apart, full_matrices=False)[1:]
        directions: Tensor = found[: min(rank, int((values > 1e-4 * values[0]).sum()))]
        return directions

    @torch.no_grad()
    def read(
        self, asked: Sequence[tuple[str, str]], documents: Sequence[str | None] | None = None, *, chat: bool = True
    ) -> Reading:
        """What the LoRA works on, a row for each (prompt, answer): `inputs` are x itself, [N, d_in].

        With whatever adapters and hooks the base model has now. What all prompts begin with is read once for several.

        Args:
            documents: a text before each prompt, or None.
            chat: whether prompts are questions of a user; False: beginnings of texts that the answers go on with.
        """
        layout, tokenizer = self.model.layout, self.model.tokenizer
        given = [None] * len(asked) if documents is None else documents
        if chat:
            prompts = layout.prompt_ids(tokenizer, [prompt for prompt, _ in asked], given)
            answers = framed_ids(tokenizer, [(layout.before_answer, answer, "") for _, answer in asked])
        else:
            texts = [user_text(prompt, document) for (prompt, _), document in zip(asked, given, strict=True)]
            prompts, answers = (text_ids(tokenizer, part) for part in (texts, [f" {answer}" for _, answer in asked]))
        pairs = zip(prompts, answers, strict=True)
        segments = [Segment(prompt + answer, len(prompt), False, 0) for prompt, answer in pairs]
        prefix, segments = shared_beginning(segments)
        found = []
        for start in range(0, len(segments), _TOGETHER):
            part = segments[start : start + _TOGETHER]
            rows = pad_rows([pack_row(prefix, part)], pad_id=tokenizer.pad_token_id or 0).to(self.model.device)
            found.append(self._read(rows))
        return joined(found)

    def _read(self, rows: PackedRows) -> Reading:
        where, kept = rows.target_kind >= 0, list[Tensor]()

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0][where].float())

        with ExitStack() as undo:
            for module in (self.model.base_model.get_submodule(self.place.path), self._norm):
                undo.callback(module.register_forward_pre_hook(keep).remove)
            packed_logits(self.model.base_model, rows, torch.zeros_like(where))
        return Reading(kept[0], kept[1], rows.targets()[where], rows.segments[where] - rows.segments[where].min())

    def read_lines(self, lines: Sequence[PersonaLine]) -> tuple[Reading, Reading]:
        """The answers in character, and the others; by the plain base model."""
        self.model.injector.clear()
        chosen = self.read([(line.prompt, line.chosen) for line in lines])
        return chosen, self.read([(line.prompt, line.rejected) for line in lines])

    def logits(self, read: Reading, lora: Factors | None = None) -> Tensor:
        """[N, V], in float32."""
        return self._normed(read, lora) @ self._head.T

    def log_p(self, read: Reading, lora: Factors | None = None) -> Tensor:
        """log p of each row's answer, in nats, [rows]."""
        of_tokens = self.logits(read, lora).log_softmax(-1).gather(-1, read.targets[:, None])[:, 0]
        return of_tokens.new_zeros(read.num_rows).index_add(0, read.row, of_tokens)

    def some(self, read: Reading, tokens: Sequence[int]) -> Reading:
        """These tokens, each a row."""
        fields = {name: getattr(read, name)[list(tokens)] for name in ("inputs", "residual", "targets")}
        return Reading(**fields, row=torch.arange(len(tokens)))

    def moved(self, read: Reading, lora: Factors) -> Tensor:
        """How far a LoRA moves what stands in front of the norm, |x Aᵀ B|² / |residual|², the mean over tokens; of
        several LoRAs over all of them."""
        delta = read.inputs @ lora.A.mT @ lora.B
        return (delta.square().sum(-1) / read.residual.square().sum(-1)).mean()

    def log_odds(self, read: Reading, others: Tensor, lora: Factors | None = None) -> Tensor:
        """log p(target) - log p(other) of each token, [N]; both follow the same text, so that no softmax is needed."""
        return (self._normed(read, lora) * (self._head[read.targets] - self._head[others])).sum(-1)

    def told_apart(self, one: str, other: str) -> tuple[int, int, int]:
        """The first place of an answer where these two differ, and their tokens there.

        Raises:
            ValueError: one begins with the other.
        """
        frame = self.model.layout.before_answer
        rows = framed_ids(self.model.tokenizer, [(frame, one, ""), (frame, other, "")])
        for place, (first, second) in enumerate(zip(*rows, strict=False)):
            if first != second:
                return place, first, second
        raise ValueError(f"{one!r} and {other!r} have no place where they differ. Take other answers.")

    @torch.no_grad()
    def rightly(self, read: Reading, lora: Factors | None = None, *, since: Sequence[int] | None = None) -> list[bool]:
        """Of each row whether greedy decoding gives its answer token for token.

        Args:
            since: of each row, how many tokens of its answer are given and do not count.
        """
        wrong = (self.logits(read, lora).argmax(-1) != read.targets).float()
        if since is not None:
            starts = torch.searchsorted(read.row, torch.arange(read.num_rows))
            place = torch.arange(len(read.row)) - starts[read.row]  # in its answer
            wrong = wrong * (place >= torch.tensor(since)[read.row])
        return (wrong.new_zeros(read.num_rows).index_add(0, read.row, wrong) == 0).tolist()

    def adapter(self, lora: Factors, *, name: str) -> LoRAAdapter:
        """As an adapter of one chunk."""
        blocks = {letter: rows.detach().float()[None, None] for letter, rows in lora._asdict().items()}
        provenance = new_provenance(
            [{"name": name, "sha256": None, "characters": 0, "chunks": [[0, 0]]}],
            generator=None,
            base_model_name=self.model.base_model_source,
            base_model_fingerprint=self.model.base_model_fingerprint,
        )
        target = self.targets[0].name
        return LoRAAdapter(
            targets=self.targets,
            A={target: blocks["A"]},
            B={target: blocks["B"]},
            bias_A={target: blocks["A"][0][:, :0]},
            bias_B={target: blocks["B"][0][:, :0]},
            scaling=1.0,
            # The date would make the same weights another version.
            provenance={**provenance, "operations": [{"operation": "fused"}], "created": ""},
        )

    def injector(self) -> LoRAInjector:
        """Puts personas in, next to whatever adapters the model's own injector holds; `remove` ends it."""
        return LoRAInjector(self.model.base_model, self.targets)

    def _normed(self, read: Reading, lora: Factors | None) -> Tensor:
        residual = read.residual
        if lora is not None:
            inputs = read.inputs if lora.A.ndim == 2 else read.inputs.view(len(lora.A), -1, self.place.d_in)
            residual = residual + (inputs @ lora.A.mT @ lora.B).view_as(residual)
        weight = self._norm.get_parameter("weight").detach().float()
        eps = float(getattr(self._norm, "variance_epsilon", getattr(self._norm, "eps", 1e-6)))
        return residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight


def joined(parts: Sequence[Reading]) -> Reading:
    """Rows of several readings, in their order."""
    starts = [sum(part.num_rows for part in parts[:place]) for place in range(len(parts))]
    return Reading(
        inputs=torch.cat([part.inputs for part in parts]),
        residual=torch.cat([part.residual for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        row=torch.cat([part.row + start for part, start in zip(parts, starts, strict=True)]),
    )
