"""What the keys of a chunk learn from the chunk as a whole: a key of "Tuesday" may answer a question that says "When".

reader = KeyReader(num_layers=10, key_dim=256)
added = reader(keys, is_token)                     # [C, T, K], [C, T] -> [C, T, K], zero before training
"""

import torch
from torch import Tensor, nn

_HEAD_DIM = 32


class KeyReader(nn.Module):
    """Blocks of attention over a chunk's tokens, in both directions, each token read in its own layer's directions.

    Args:
        num_layers: the layers for keys; token t has its key in layer t mod num_layers.
        key_dim: K.
        width, num_blocks: of the attention blocks.
        max_tokens: most tokens of a chunk.
        dropout: while training.

    Source: the keys are contextual as in ColBERT, https://arxiv.org/abs/2004.12832; that they start as the base model's
    own whitened inputs, to which this adds 0, is ours: learned from nothing they find .53 of real paragraphs'
    sentences, where the untrained find .79.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        key_dim: int,
        width: int = 192,
        num_blocks: int = 2,
        max_tokens: int = 80,
        dropout: float = 0.15,
    ) -> None:
        super().__init__()
        if width % _HEAD_DIM or width < 1 or num_blocks < 1:
            raise ValueError(
                f"A key reader needs a width that {_HEAD_DIM} divides and a block, got {width} and {num_blocks}."
            )
        self.num_layers = num_layers
        self.enter = nn.Parameter(torch.randn(num_layers, key_dim, width) * 4 * key_dim**-0.5)
        self.places = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(
            width, width // _HEAD_DIM, 4 * width, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.blocks = nn.TransformerEncoder(block, num_blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Parameter(torch.zeros(num_layers, width, key_dim))

    def forward(self, keys: Tensor, is_token: Tensor) -> Tensor:
        """What is added to the keys, [C, T, K].

        Args:
            keys: [C, T, K], of unit length.
            is_token: [C, T] bool. What stands elsewhere is not read; every chunk has a token.
        """
        layer = torch.arange(keys.shape[1], device=keys.device) % self.num_layers
        x = torch.einsum("ctk, tkw -> ctw", self.dropout(keys), self.enter[layer]) + self.places[: keys.shape[1]]
        x = self.norm(self.blocks(x, src_key_padding_mask=~is_token))
        return torch.einsum("ctw, twk -> ctk", x, self.leave[layer])
