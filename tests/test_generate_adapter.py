"""generate_adapter.py as a user meets it: arguments, table, adapter folder, and what it says when something is wrong.

Nearly all runs are in this process, with a tiny random checkpoint; a process of its own costs seconds of imports.
"""

import errno
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import PeftModel
from rich.cells import cell_len
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import generate_adapter
from hypernet.adapters.adapter import ADAPTER_FILES, LoRAAdapter
from hypernet.base.base_model import build_base_model
from hypernet.base.tokenizer import train_tokenizer
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.checkpoint import WEIGHTS_FILE
from hypernet.text.documents import read_documents

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "generate_adapter.py"
TEXT = "Branmir Ralquist won the Royal Star. He was born in Palnostead. The one who taught him was Porus Helstad."
WINDOW = 256


def base_model_config(tokenizer, *, hidden_size: int = 32) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random hypernetwork, strong enough to change the answers of the random base model next to it."""
    encyclopedia = Encyclopedia("train")
    tokenizer = train_tokenizer(
        (encyclopedia.record(i).document for i in range(50)), vocab_size=384, model_max_length=WINDOW
    )
    torch.manual_seed(0)
    model = DocToLoRA.build(
        base_model=build_base_model(base_model_config(tokenizer)),
        tokenizer=tokenizer,
        target_modules=["down_proj"],
        context_encoder={"kind": "per_layer_activations"},
        hypernetwork={
            "rank": 2,
            "aggregator": {
                "name": "perceiver",
                "latent_dim": 16,
                "num_latents": 4,
                "num_blocks": 1,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 8,
            },
        },
        max_chunk_tokens=24,
    )
    for parameter in model.hypernetwork.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, include_base_model=True)
    return folder


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one document in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "doc.txt").write_text(TEXT)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(work: Path, checkpoint: Path, monkeypatch, capsys) -> Iterator[Callable[..., Result]]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that what run() sets is taken back
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # so that conf/ next to the script is found

    def call(*arguments: str, stdin: bytes = b"") -> Result:
        if not any(argument.startswith("checkpoint=") for argument in arguments):
            arguments = (*arguments, f"checkpoint={checkpoint}")
        monkeypatch.setattr(sys, "argv", ["generate_adapter.py", *arguments])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin)))
        code, message = 0, ""
        try:
            generate_adapter.run()
        except SystemExit as end:
            # A text as code is what the interpreter prints before it ends with 1.
            code, message = (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code or 0, "")
        out, err = capsys.readouterr()
        return Result(code, out, err + message)

    yield call
    # Hydra put a handler there that writes to this test's standard error.
    root.handlers[:], root.level = handlers, level


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def error_line(result: Result) -> str:
    """The one line that a failed run says."""
    lines = [line for line in result.err.splitlines() if line.startswith("generate_adapter.py: ")]
    assert len(lines) == 1 and result.err.splitlines()[-1] == lines[0], result.err
    assert "Traceback" not in result.err and not result.out
    assert result.code not in (0, None)
    return lines[0]


def columns(out: str) -> list[list[str]]:
    """The table's rows, each cell as one text."""
    rows, cells = [], []
    for line in out.splitlines():
        if line[:1] in "│┃":
            cells.append([cell.strip() for cell in re.split("[│┃]", line)[1:-1]])
        elif cells:
            rows.append([" ".join(filter(None, parts)) for parts in zip(*cells, strict=True)])
            cells = []
    return rows


# What it makes


def test_refining_changes_the_adapter_and_is_told(run, work, monkeypatch):
    from hypernet import refining

    monkeypatch.setattr(refining, "_asked", lambda *args, **kwargs: [(0, "Who taught him?")])
    monkeypatch.setattr(refining, "_write", lambda model, prompts, *args, **kwargs: ["Where is it?"] * len(prompts))
    plain = run("document=doc.txt", "output_dir=plain")
    result = run("document=doc.txt", "output_dir=refined", "refine=2")
    assert plain.code == result.code == 0 and "refine" in result.out and "refine" not in plain.out
    before, after = (LoRAAdapter.load(work / name) for name in ("plain", "refined"))
    assert after.provenance["operations"][-1]["operation"] == "refine"
    assert not all(rows.equal(after.B[name]) for name, rows in before.B.items())
    timed = run("document=doc.txt", "output_dir=timed", "refine=0.001s")
    assert timed.code == 0 and LoRAAdapter.load(work / "timed").provenance["operations"][-1]["steps"] == 0


def test_run_leaves_only_the_adapter_folder(run, work):
    result = run("document=doc.txt", "output_dir=out/one")
    assert result.code == 0
    assert files(work) == sorted(["doc.txt", "out", "out/one", *(f"out/one/{name}" for name in ADAPTER_FILES)])


def test_peft_logits_equal_injected_adapter(run, checkpoint):
    assert run("document=doc.txt", "output_dir=out").code == 0
    model = DocToLoRA.from_pretrained(checkpoint)
    ids = model.tokenizer("Who taught Branmir Ralquist?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model.base_model(ids).logits
        with model.injector.using(LoRAAdapter.load("out")):
            injected = model.base_model(ids).logits
        base_model = AutoModelForCausalLM.from_pretrained(checkpoint / "base_model")
        by_peft = PeftModel.from_pretrained(base_model, "out")(ids).logits
    torch.testing.assert_close(by_peft, injected, atol=1e-4, rtol=0)
    assert (injected - plain).abs().max() > 0.01


def test_the_printed_peft_line_loads_the_adapter(run):
    out = run("document=doc.txt", "output_dir=an adapter").out
    line = next(line for line in out.splitlines() if line.startswith("PEFT "))
    names = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    assert isinstance(eval(line.removeprefix("PEFT ").strip(), names), PeftModel)


def test_command_reads_files_folder_and_standard_input(run, work):
    (work / "notes").mkdir()
    for name in ("a.md", "b, c.txt"):
        (work / "notes" / name).write_text(TEXT.replace("Branmir", name[0].upper() + "ran"))

    def read_by(*arguments: str, stdin: bytes = b"") -> list[dict]:
        assert run(*arguments, "output_dir=out", "overwrite=true", stdin=stdin).code == 0
        return LoRAAdapter.load("out").provenance["documents"]

    assert [d["name"] for d in read_by('document=[doc.txt,"notes/b, c.txt"]')] == ["doc.txt", "b, c.txt"]
    both = read_by("document=notes")
    assert [d["name"] for d in both] == ["a.md", "b, c.txt"]
    assert LoRAAdapter.load("out").num_chunks == sum(len(d["chunks"]) for d in both) > 2
    (piped,) = read_by("document=-", stdin=TEXT.encode())
    assert piped["sha256"] == read_documents("doc.txt")[0].sha256 and piped["characters"] == len(TEXT)


def test_overwrite_replaces_the_adapter(run, work):
    (work / "other.txt").write_text("Corbaford lies on the river Palnoberg.")
    assert run("document=doc.txt", "output_dir=out").code == 0
    assert run("document=other.txt", "output_dir=out", "overwrite=true").code == 0
    assert [d["name"] for d in LoRAAdapter.load("out").provenance["documents"]] == ["other.txt"]
    assert set(os.listdir("out")) == set(ADAPTER_FILES)


# What it prints


def test_table_holds_answers_with_and_without_adapter(run, checkpoint):
    questions = ["Where was he born?", "Who, then, taught [bold]him[/bold]?"]
    result = run("document=doc.txt", f"ask={json.dumps(questions)}", "max_new_tokens=5")
    model = DocToLoRA.from_pretrained(checkpoint)
    adapter = model.internalize(TEXT)
    expected = [
        model.generate(questions, max_new_tokens=5),
        model.generate(questions, adapter, max_new_tokens=5),
        model.generate(questions, documents=[TEXT] * 2, max_new_tokens=5),
    ]

    header, *rows = columns(result.out)
    assert header == [
        "Question",
        "Without context",
        "With the adapter (no document in the prompt)",
        "Document in the prompt",
    ]
    assert [row[0] for row in rows] == questions

    def letters(text: str) -> str:
        return re.sub(r"[^\w/]", "", text)  # of a random model's answer; blanks and control characters are the table's

    assert [[letters(cell) for cell in row[1:]] for row in rows] == [
        [letters(answer) for answer in row] for row in zip(*expected, strict=True)
    ]
    assert expected[0] != expected[1]


def test_piped_output_is_plain_text_and_logs_go_to_stderr(run):
    result = run("document=doc.txt", 'ask=["Who taught Branmir Ralquist?"]')
    table = [line for line in result.out.split("\n") if line and line[0] in "┏┃┡│├└"]
    assert "\x1b" not in result.out
    assert table and max(map(cell_len, table)) <= generate_adapter.PIPED_WIDTH
    assert "Loading" in result.err and "Loading" not in result.out
    summary = [line.split()[0] for line in result.out.split("\n") if line and line not in table]
    assert summary == ["Read", "Adapter", "Joined", "Seconds", "PEFT"]
    assert re.search(r"^Read     doc.txt: \d+ tokens in \d+ chunks$", result.out, re.M)
    assert re.search(r"^Adapter  outputs/adapter: rank \d+, \d+(\.\d)? KiB$", result.out, re.M)
    for stage in ("read and chunk", "load", "internalize", "answer", "save"):
        assert re.search(rf"^Seconds .*{stage} \d+\.\d\d", result.out, re.M)


def test_no_questions_print_no_table(run):
    assert run("document=doc.txt").out.startswith("Read ")


def test_single_text_is_one_question(run):
    result = run("document=doc.txt", "ask=Who taught Branmir Ralquist?", "max_new_tokens=2")
    assert [row[0] for row in columns(result.out)] == ["Question", "Who taught Branmir Ralquist?"]


@pytest.mark.parametrize(
    "question", ["Who is ${HOME}?", "${oc.env:HOME}", "Is ${? open", "a \\\\${x} \\${y}", '${a} "${b}"', "${ä,b}"]
)
def test_interpolation_in_a_question_is_taken_literally(question):
    quoted = question.replace('"', '\\"')
    for argument, given in {f'ask="{quoted}"': question, f'ask=["{quoted}",7]': [question, 7]}.items():
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("generate_adapter", [generate_adapter.literal(argument)])
        assert OmegaConf.to_container(cfg, resolve=True)["ask"] == given


def test_interpolation_in_a_path_is_taken_literally(run, work):
    (work / "a${HOME}.txt").write_text(TEXT)
    result = run('document="a${HOME}.txt"', "output_dir=out/${x}", 'ask=["Is ${HOME set?"]', "max_new_tokens=2")
    assert "Is ${HOME set?" in result.out and (work / "out" / "${x}" / "provenance.json").is_file()


def test_byte_of_a_question_that_is_no_utf8_is_replaced(run):
    result = run("document=doc.txt", 'ask=["Who is K\udce4the?"]', "max_new_tokens=2")
    assert result.code == 0 and "Who is K\ufffdthe?" in result.out


def test_invisible_characters_of_a_question_are_dropped(run):
    result = run("document=doc.txt", 'ask=["Who\u00a0taught Bran\u00admir\u200b?"]', "max_new_tokens=2")
    assert "Who taught Branmir?" in result.out


def test_compare_false_answers_with_the_adapter_only(run):
    header, _ = columns(run("document=doc.txt", "ask=Who?", "max_new_tokens=2", "compare=false").out)
    assert header == ["Question", "With the adapter (no document in the prompt)"]


def test_scale_multiplies_what_the_adapter_does_by_layer(run):
    run("document=doc.txt", "output_dir=plain")
    run("document=doc.txt", "output_dir=scaled", "scale=[1,2.5]")
    plain, scaled = LoRAAdapter.load("plain"), LoRAAdapter.load("scaled")
    for mine, theirs, axis in ((scaled.B, plain.B, 1), (scaled.bias_B, plain.bias_B, 0)):
        for factor, layer in ((1, 0), (2.5, 1)):
            for name in mine:
                assert torch.equal(mine[name].select(axis, layer), theirs[name].select(axis, layer) * factor)
    assert all(torch.equal(scaled.A[name], plain.A[name]) for name in plain.A)


def test_scale_of_another_number_of_layers_is_refused(run):
    result = run("document=doc.txt", "scale=[1,2,3]")
    assert "one for each of the 2 adapted layers, got 3 numbers." in error_line(result)
    assert "Loading" not in result.err


# How chunks are joined


QUESTION = "Who taught Branmir Ralquist?"


def answered(run, *settings: str) -> tuple[str, LoRAAdapter, str]:
    """The answer to QUESTION, the adapter that is saved, and what is printed of how it is joined."""
    out = run("document=doc.txt", f"ask={QUESTION}", "max_new_tokens=4", "compare=false", *settings).out
    _, (_, text) = columns(out)
    adapter = LoRAAdapter.load("outputs/adapter")
    assert adapter.num_chunks > 1
    (joined,) = re.findall(r"^Joined   (.*)$", out, re.M)
    return " ".join(text.split()), adapter, joined


@pytest.mark.parametrize("settings", [["join=gate", "gate_power=1.5"], ["join=route", "top_k=1"]], ids=" ".join)
def test_chosen_chunks_are_saved_as_generated(run, checkpoint, settings):
    text, adapter, joined = answered(run, *settings)
    model = DocToLoRA.from_pretrained(checkpoint)
    way, (name, value) = settings[0].partition("=")[2], settings[1].split("=")
    (expected,) = model.generate([QUESTION], adapter, join=way, **{name: json.loads(value)}, max_new_tokens=4)
    assert text == " ".join(expected.split())
    assert not adapter.is_fused and adapter.content_id() == model.internalize(TEXT).content_id()
    assert joined.startswith(f"for each question by join={way} {name}={value}; saved as generated.")


def test_size_of_a_very_long_document_is_told_before_it_is_read(run, work):
    (work / "doc.txt").write_text(" ".join(f"Town {i} has {i * 7} houses and a mill by the river." for i in range(200)))
    result = run("document=doc.txt", "join=sum")
    assert result.code == 0, result.err
    found = re.search(r"([\d,]+) chunks make an adapter of rank ([\d,]+) and ([\d,]+) MB", result.err + result.out)
    assert found
    chunks, rank, _ = (int(number.replace(",", "")) for number in found.groups())
    assert chunks > 128 and rank == 2 * chunks


@pytest.mark.parametrize("settings", [["join=ridge", "ridge=0.5"], ["join=sum"], []], ids=" ".join)
def test_joined_for_good_one_plain_lora_answers_and_is_saved(run, checkpoint, settings):
    text, adapter, joined = answered(run, *settings)
    model = DocToLoRA.from_pretrained(checkpoint)  # trained for the sum
    generated = model.internalize(TEXT)
    expected = generated.fused("ridge", ridge=0.5) if "join=ridge" in settings else generated
    assert adapter.content_id() == expected.content_id()
    (answer,) = model.generate([QUESTION], adapter, max_new_tokens=4)
    assert text == " ".join(answer.split())
    way = "join=ridge ridge=0.5" if "join=ridge" in settings else "join=sum"
    assert joined == f"by {way}: one plain LoRA for any program"


def test_null_takes_the_way_and_ridge_of_the_checkpoint(run, checkpoint, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    config = OmegaConf.load(trained / "config.yaml")
    config.ridge = 2.0
    OmegaConf.save(config, trained / "config.yaml")
    expected = DocToLoRA.from_pretrained(trained).internalize(TEXT).fused("ridge", ridge=2.0)
    for settings in ([], ["join=ridge"]):
        _, adapter, joined = answered(run, f"checkpoint={trained}", "overwrite=true", *settings)
        assert adapter.content_id() == expected.content_id() and joined.startswith("by join=ridge ridge=2:")


def test_sum_of_a_checkpoint_trained_with_a_ridge_is_the_sum(run, checkpoint, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    config = OmegaConf.load(trained / "config.yaml")
    config.ridge = 2.0
    OmegaConf.save(config, trained / "config.yaml")
    text, adapter, joined = answered(run, f"checkpoint={trained}", "join=sum")
    model = DocToLoRA.from_pretrained(trained)
    generated = model.internalize(TEXT)
    assert adapter.content_id() == generated.content_id() and joined.startswith("by join=sum:")
    (expected,) = model.generate([QUESTION], generated, join="sum", max_new_tokens=4)
    assert text == " ".join(expected.split())


def test_one_chunk_has_nothing_to_join(run, work):
    (work / "short.txt").write_text("Norbach is a town.")
    assert "Joined" not in run("document=short.txt").out


def test_document_longer_than_window_is_marked_in_the_table(run, work):
    (work / "long.txt").write_text(" ".join([TEXT] * 6))
    _, (_, without, with_adapter, in_prompt) = columns(run("document=long.txt", "ask=Who?", "max_new_tokens=3").out)
    assert re.fullmatch(rf"\(does not fit: \d+ tokens and 3 for the answer, the base model takes {WINDOW}\)", in_prompt)
    assert "does not fit" not in without + with_adapter


def test_progress_bar_appears_with_more_than_one_chunk(run, work, monkeypatch):
    assert "chunk/s" not in run("document=doc.txt", "max_batch_tokens=1").err  # bars are for terminals
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "chunk/s" in run("document=doc.txt", "max_batch_tokens=1", "overwrite=true").err
    (work / "short.txt").write_text("Norbach is a town.")
    assert "chunk/s" not in run("document=short.txt", "overwrite=true").err


def test_sizes_are_readable():
    sizes = [0, 1023, 1024, 1536, 5 * 1024**2, 3 * 1024**3, 5000 * 1024**3]
    expected = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "5000.0 GiB"]
    assert [generate_adapter.human_bytes(size) for size in sizes] == expected


# Its help


@pytest.fixture
def help_text(run) -> str:
    result = run("--help")
    assert result.code == 0
    return result.out


def test_help_names_every_setting_with_its_default(help_text):
    config = OmegaConf.load(ROOT / "conf/generate_adapter.yaml")
    for key in generate_adapter.GenerateSettings.model_fields:
        value = config[key]
        default = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        default = "" if key == "document" else default
        assert re.search(rf"^ *{key}={re.escape(default)}  ", help_text, re.M), key


def test_defaults_of_joining_are_those_of_the_file():
    config = OmegaConf.load(ROOT / "conf/generate_adapter.yaml")
    for name in generate_adapter.SETTING_OF.values():
        assert generate_adapter.GenerateSettings.model_fields[name].default == config[name]


def test_help_commands_can_be_copied(help_text, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^ *python generate_adapter.py (.*)$", help_text, re.M)
    assert len(commands) >= 5
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for command in commands:
            arguments = shlex.split(command.partition(" <")[0])
            cfg = compose("generate_adapter", overrides=arguments)
            settings = generate_adapter.SCRIPT.check(cfg)
            read_documents([path for path in settings.document if path != "-"] or "examples")


def test_help_quoting_works(help_text):
    quoted = {
        "'document=\"drafts/a=b, second.txt\"'": ("document", ["drafts/a=b, second.txt"]),
        '\'document=["a, b.txt","c (1).md"]\'': ("document", ["a, b.txt", "c (1).md"]),
        '\'ask=["Who, if anyone, taught Fenda Elfax?","When?"]\'': (
            "ask",
            ["Who, if anyone, taught Fenda Elfax?", "When?"],
        ),
        '"ask=\\"What is Fenda Elfax\'s hobby?\\""': ("ask", ["What is Fenda Elfax's hobby?"]),
    }
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for text, (key, value) in quoted.items():
            assert text in help_text
            cfg = compose("generate_adapter", overrides=["document=x", *shlex.split(text)])
            assert getattr(generate_adapter.SCRIPT.check(cfg), key) == value


# What it says when something is wrong: one line, and nothing is left behind


def written(work: Path, name: str, content: bytes) -> str:
    (work / name).write_bytes(content)
    return f"document={name}"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "Cannot read 'missing.txt': No such file"),
        ("empty.txt", b"", "'empty.txt' is empty"),
        ("blank.txt", b" \n\n", "'blank.txt' is empty"),
        ("binary.txt", bytes(range(256)), "'binary.txt' is binary"),
        ("latin.txt", "Ein Gruß aus Köln".encode("latin-1"), "'latin.txt' should be UTF-8.*iconv"),
    ],
)
def test_unreadable_document_is_a_one_line_error(run, work, name, content, says):
    if content is not None:
        written(work, name, content)
    before = files(work)
    assert re.search(says, error_line(run(f"document={name}")))
    assert files(work) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Which document?.*document=examples/office_memo.txt.*--help"),
        (["document=[]"], "Which document?"),
        (["document={a:1}"], "document should be a text or a list of texts, got {'a': 1}"),
        (["documnt=doc.txt"], "There is no setting 'documnt'. There are document, output_dir"),
        (["document=doc.txt", "document.name=x"], "There is no setting 'document.name'"),
        (["document=doc.txt", "+rank=8"], "There is no setting 'rank'"),
        (["doc.txt"], "Cannot read the argument 'doc.txt'. Settings are key=value"),
        (["document=a=b.txt"], "Cannot read the argument 'document=a=b.txt'.*double quotes.*single quotes"),
        (["document=doc.txt", "ask=Who's there?"], 'Cannot read the argument "ask=Who\'s there\\?"'),
        (["document=doc.txt", 'ask=["Who?"'], "Cannot read the argument"),
        (["document=a.txt,b.txt"], r"brackets: 'document=\[a.txt,b.txt\]'.*quotes: 'document=\"a.txt,b.txt\"'"),
        (["--document", "doc.txt"], "no dashes: write document=... instead of --document"),
        (["--document=doc.txt"], "no dashes: write document=doc.txt instead of --document=doc.txt"),
        (["document=doc.txt", "ask=[[Who]]"], "ask should be a text or a list of texts, got .*Write 'ask="),
        (["document=doc.txt", 'ask=["Who?",""]'], "ask has an empty question. Leave it out"),
        (["document=${HOME}.txt"], r"Cannot read '\$\{HOME\}.txt': No such file"),
        (["document=doc.txt", "device=${nothing}"], r"device should be cpu, cuda or auto, got '\$\{nothing\}'"),
        (["document=doc.txt", "overwrite=maybe"], "overwrite should be true or false, got 'maybe'"),
        (["document=doc.txt", "scale=strong"], "scale should be a number, or one for each .* got 'strong'"),
        (["document=doc.txt", "ask={a: 1}"], "ask should be a text or a list of texts, got"),
        (["document=doc.txt", "--bogus"], "There is no option --bogus. Settings are key=value, without dashes"),
        (["document=doc.txt", "scale=[]"], r"scale should be a number, or one for each layer.* got \[\]"),
        (["document=doc.txt", "quantization=int3"], "quantization should be one of int8, 4bit or null, got 'int3'"),
        (["document=doc.txt", "max_batch_tokens=0"], "max_batch_tokens should be a whole number, at least 1, got 0"),
        (["document=doc.txt", "refine=soon"], "refine should be .*30, .*60s, .*'soon'"),
        (["document=doc.txt", "refine=0"], "refine should be .*30, .*60s, .*0"),
        (["document=doc.txt", "max_new_tokens=few"], "max_new_tokens should be a whole number"),
        (["document=doc.txt", "max_new_tokens=2.5"], "max_new_tokens should be a whole number, at least 1, got 2.5"),
        (["document=doc.txt", "join=all"], "join should be one of sum, ridge, gate, route, or null .*, got 'all'"),
        (["document=doc.txt", "join=route", "top_k=0"], "top_k should be a whole number, at least 1, got 0"),
        (["document=doc.txt", "join=gate", "gate_power=0"], "gate_power should be a number above 0, such as .* got 0"),
        (["document=doc.txt", "join=gate", "gate_power=soft"], "gate_power should be a number above 0.* got 'soft'"),
        (["document=doc.txt", "join=ridge", "ridge=-1"], "ridge should be a number above 0, such as 8, .*got -1"),
        (["document=doc.txt", "join=ridge"], "join=ridge needs a ridge, such as 8.0"),
        (["document=doc.txt", "ridge=8"], "ridge is the setting of join=ridge, but join is null. Set join=ridge, or"),
        (["document=doc.txt", "join=ridge", "top_k=3"], "top_k is the setting of join=route, but join is ridge"),
        (["document=doc.txt", "join=route", "gate_power=1"], "gate_power is the setting of join=gate, but join is rou"),
        (["document=doc.txt", "route=2"], "no setting 'route' any more: write join=route top_k=2"),
        (["document=doc.txt", "gate=1.5"], "no setting 'gate' any more: write join=gate gate_power=1.25"),
        (["document=doc.txt", "+amplitude=2"], "no setting 'amplitude' any more: write scale=1.5"),
        (["document=doc.txt", "~ask"], "ask should be a text or a list of texts, got None"),
        (["document=doc.txt", "output_dir=null"], "output_dir should be a folder, got None"),
        (["document=doc.txt", "dtype=float8"], "dtype should be one of float32, .* or null, got 'float8'"),
        (["document=doc.txt", "device=tpu"], "device should be cpu, cuda or auto, got 'tpu'"),
        (["document=doc.txt", "attention=magic"], "attention should be one of eager, .*, got 'magic'"),
    ],
)
def test_invalid_settings_are_one_line_errors(run, work, arguments, says):
    assert re.search(says, error_line(run(*arguments)))
    assert files(work) == ["doc.txt"]


def test_cuda_without_a_gpu_is_a_one_line_error(run, work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search("finds 0 CUDA GPUs. Set device=cpu", error_line(run("document=doc.txt", "device=cuda")))
    assert files(work) == ["doc.txt"]
    assert generate_adapter.choose_device("auto") == "cpu"


def cut_weights(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def change_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)


def change_base_model(folder: Path) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(folder / "base_model")
    with torch.no_grad():
        next(base_model.parameters())[0] += 1
    base_model.save_pretrained(folder / "base_model")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "There is no checkpoint folder .*copy. Name one with checkpoint="),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda folder: (folder / "config.yaml").write_text("- 1\n"), "config.yaml is damaged"),
        (cut_weights, "cut off"),
        (change_weights, "not what config.yaml was written for"),
        (change_base_model, "was made for the base model .* Give the base model it was trained with"),
    ],
)
def test_unusable_checkpoint_is_a_one_line_error(run, work, checkpoint, tmp_path, damage, says):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    assert re.search(says, error_line(run("document=doc.txt", f"checkpoint={copy}")))
    assert files(work) == ["doc.txt"]


def test_base_model_of_another_shape_is_a_one_line_error(run, work, checkpoint, tmp_path):
    model = DocToLoRA.from_pretrained(checkpoint)
    other = build_base_model(base_model_config(model.tokenizer, hidden_size=16))
    other.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    for more in ([], ["dtype=float32"]):
        error_line(run("document=doc.txt", f"base_model={tmp_path / 'other'}", *more))
    assert files(work) == ["doc.txt"]


def test_output_folder_in_use_is_left_unchanged(run, work):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("mine")
    before = files(work)
    line = error_line(run("document=doc.txt", "output_dir=out"))
    assert "is not empty. Name another folder." in line and "overwrite" not in line  # which would be refused next
    assert "not replaced" in error_line(run("document=doc.txt", "output_dir=out", "overwrite=true"))
    assert "is a file" in error_line(run("document=doc.txt", "output_dir=doc.txt"))
    assert files(work) == before


def no_space(error: Exception) -> Callable:
    def save_file(_, path: Path, **__) -> None:
        path.write_bytes(b"half of it")
        raise error

    return save_file


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "adapter_model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_leaves_no_adapter_files(run, work, monkeypatch, error):
    monkeypatch.setattr(safetensors.torch, "save_file", no_space(error))
    line = error_line(run("document=doc.txt", "output_dir=deep/out", "ask=Who?"))
    assert re.search("No space left on the disk of .* Free some", line)
    assert files(work) == ["doc.txt"]


def test_unwritable_folder_is_a_one_line_error(run, work, monkeypatch):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out")
    monkeypatch.setattr(safetensors.torch, "save_file", no_space(error))
    assert "Permission denied: out. Check" in error_line(run("document=doc.txt", "output_dir=out"))
    assert files(work) == ["doc.txt"]


def raising(error: BaseException) -> Callable:
    def function(*_, **__) -> None:
        raise error

    return function


def test_out_of_memory_says_what_to_lower(run, work, monkeypatch):
    monkeypatch.setattr(DocToLoRA, "internalize", raising(torch.OutOfMemoryError("CUDA out of memory. Tried")))
    assert "Lower max_batch_tokens" in error_line(run("document=doc.txt"))
    assert files(work) == ["doc.txt"]


def test_internal_error_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(DocToLoRA, "internalize", raising(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run("document=doc.txt")


@pytest.mark.parametrize("stage", ["internalize", "generate", "save"])
def test_interrupt_leaves_output_unchanged(run, work, monkeypatch, stage):
    assert run("document=doc.txt", "output_dir=out").code == 0
    before = {name: (work / name).read_bytes() for name in files(work) if (work / name).is_file()}
    if stage == "save":
        monkeypatch.setattr(safetensors.torch, "save_file", no_space(KeyboardInterrupt()))
    else:
        monkeypatch.setattr(DocToLoRA, stage, raising(KeyboardInterrupt()))
    for more in (["output_dir=out", "overwrite=true"], ["output_dir=new/folder"]):
        result = run("document=doc.txt", "ask=Who?", *more)
        assert result.code == 130 and "interrupted" in error_line(result)
    assert {name: (work / name).read_bytes() for name in files(work) if (work / name).is_file()} == before


# As a process of its own


def test_command_works_from_another_folder_and_reads_a_pipe(commands, work, checkpoint):
    arguments = ["document=-", "output_dir=out", f"checkpoint={checkpoint}", "ask=Who?", "max_new_tokens=2"]
    done = commands.run("generate_adapter.py", arguments, cwd=work, stdin=TEXT)
    assert done.code == 0, done.stderr
    assert "Document in the prompt" in done.stdout and "standard input" in done.stdout and "\x1b" not in done.stdout
    assert set(os.listdir("out")) == set(ADAPTER_FILES)


def test_ctrl_c_exits_with_130_and_leaves_no_files(commands, work, checkpoint):
    (work / "long.txt").write_text("\n\n".join([TEXT] * 2000))
    arguments = ["document=long.txt", "output_dir=deep/out", f"checkpoint={checkpoint}", "max_batch_tokens=1"]
    kill = {"said": "Internalizing", "signal": int(signal.SIGINT)}
    done = commands.run("generate_adapter.py", arguments, cwd=work, kill=kill)
    assert done.code == 130 and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.splitlines()[-1] == "generate_adapter.py: interrupted"
    assert files(work) == ["doc.txt", "long.txt"]


def test_missing_document_fails_before_importing_torch(work, checkpoint):
    """From another folder, in a process of its own."""
    arguments = ["document=missing.txt", f"checkpoint={checkpoint}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    imported = re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert "hydra" in imported and not {"torch", "transformers"} & set(imported)
    assert done.stdout == "" and [line for line in done.stderr.splitlines() if "import time:" not in line] == [
        "generate_adapter.py: Cannot read 'missing.txt': No such file or directory. Check the path."
    ]


# The example documents


def test_example_entities_are_absent_from_training():
    encyclopedia = Encyclopedia("test")
    for document in read_documents([ROOT / f"examples/{name}.txt" for name in ("fenda_elfax", "corbaford")]):
        names = re.findall(r"[A-Z]\w+ [A-Z]\w+|(?<=in |er )[A-Z]\w+(?=\.)", document.text)
        assert names
        assert {encyclopedia._split_of(name) for name in names if name != "Bronze Ribbon"} == {"test"}, names


@pytest.mark.parametrize("ends", [None, ValueError])
def test_answering_shows_how_many_tokens_are_done(capsys, monkeypatch, ends):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = SimpleNamespace(pause=None)
    try:
        with generate_adapter.answering(model, num_tokens=8):
            for _ in range(3):
                time.sleep(0.11)  # a bar is drawn every tenth of a second
                model.pause()
            if ends is not None:
                raise ends
    except ValueError:
        pass
    assert model.pause is None
    assert "Answering" in (shown := capsys.readouterr().err) and "3/8" in shown
