"""The flags of all verbs together: one meaning each, examples that are understood, old spellings that still are."""

import argparse
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from qat.cli import main
from qat.cli.parser import VERBS, make_parser, module_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"qat/calibrate.py": "calibrate", "qat/finetune.py": "finetune", "qat/train.py": "train"}


@pytest.fixture(scope="module")
def parser():
    return make_parser()


@pytest.fixture(scope="module")
def by_flag(parser):
    """flag → [(verb, action)]"""
    found = defaultdict(list)
    for verb in VERBS:
        for action in parser.verb_parser(verb).shown():
            for flag in action.option_strings:
                found[flag].append((verb, action))
    return found


def meaning(action):
    """A flag's help without its default and what follows it."""
    return re.split(r"[;(]", action.help)[0].strip()


def test_every_flag_says_what_it_is_for_and_what_it_takes(by_flag):
    for flag, uses in by_flag.items():
        for verb, action in uses:
            assert action.help, (verb, flag)
            assert action.nargs == 0 or action.metavar or action.choices, (verb, flag)


def test_a_flag_takes_the_same_kind_of_value_in_every_verb(by_flag):
    written = {"CKPT", "DIR", "PNG", "HTML"}  # --out names what it writes
    data = {
        "ROOT",
        "ROOT[:SPLIT]",
        "FILE",
    }  # of the verbs that train it may be given again; export-mmdet3d takes one file
    # MMDeploy's names, which `test` has to have: there --model takes files, and --out a pickle.
    by_flag = {
        flag: [(verb, action) for verb, action in uses if (verb, flag) not in {("test", "--model"), ("test", "--out")}]
        for flag, uses in by_flag.items()
    }
    for flag, uses in by_flag.items():
        kinds = {action.metavar for _, action in uses}
        allowed = {"--out": written, "--data": data}.get(flag)
        assert kinds <= allowed if allowed else len(kinds) == 1, (flag, kinds)
        assert flag == "--onnx" or len({action.nargs for _, action in uses}) == 1, flag  # one folder, or several
        # --data may be given again in some verbs; --format of export says which flags go with pt2
        assert flag in ("--data", "--format") or len({action.type for _, action in uses}) == 1, flag


@pytest.mark.parametrize(
    "flag", ["--config", "--version", "--split", "--threads", "--rounds", "--repeats", "--seed", "--prefix", "--json"]
)
def test_a_shared_flag_is_explained_in_the_same_words(by_flag, flag):
    explained = {meaning(action).split(":")[0].split(",")[0] for _, action in by_flag[flag]}
    assert len(by_flag[flag]) > 1 and len(explained) == 1, explained


def test_every_verb_with_a_result_has_json(by_flag):
    assert {verb for verb, _ in by_flag["--json"]} == set(VERBS) - {"completion"}


def test_defaults_in_the_help_are_the_defaults(by_flag):
    for flag, uses in by_flag.items():
        for verb, action in uses:
            told = re.search(r"\(default (\S+?)(?=[);:, ])", action.help)
            if told and isinstance(action.default, int | float) and not isinstance(action.default, bool):
                assert float(told[1]) == action.default, (verb, flag)
            elif told and isinstance(action.default, Path):
                assert Path(told[1]) == action.default, (verb, flag)


def example_lines():
    for verb in VERBS:
        module = (ROOT / f"{module_of(verb).replace('.', '/')}.py").read_text()
        text = re.sub(r"\\\\\n\s+", "", module.split('"""')[1])  # continued lines
        assert re.search(r"\nexamples?:\n", text), verb
        for line in text.splitlines():
            if line.startswith("  bevqat ") or "torchrun" in line:
                yield pytest.param(line.strip(), id=f"{verb}: {line.strip()[:60]}")


@pytest.mark.parametrize("line", example_lines())
def test_an_example_of_the_help_is_understood(parser, line):
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        script = next(word for word in words if word in SCRIPTS)
        words = ["bevqat", SCRIPTS[script], *words[words.index(script) + 1 :]]
    for end in (">", "&&"):
        words = words[: words.index(end)] if end in words else words
    parser.parse_args(words[1:])


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        ("train --data a:b --init x.pth", "ckpt", Path("x.pth")),
        ("train --data a:b --ckpt x.pth", "ckpt", Path("x.pth")),
        ("verify --part fuser runs", "parts", ["fuser"]),
        ("verify runs --part fuser --part head.bbox", "parts", ["fuser", "head.bbox"]),
        ("verify runs --parts fuser head.bbox", "parts", ["fuser", "head.bbox"]),
        ("export-camera --ckpt a --fp16", "precision", "fp16"),
        ("export-camera --ckpt a --precision fp16", "precision", "fp16"),
        ("compare --fp32 a --int8 b --int8 c", "int8", [Path("b"), Path("c")]),
        ("compare --onnx a b", "onnx", [Path("a"), Path("b")]),
        ("synth --out a --scenes 1 --seed 3", "seed", 3),
    ],
)
def test_old_spellings_and_new_ones_mean_the_same(parser, words, dest, value):
    assert getattr(parser.parse_args(words.split()), dest) == value


@pytest.mark.parametrize("words", ["health {}", "inspect {}", "sensitivity {}"])
def test_a_checkpoint_is_named_by_itself_or_by_ckpt(parser, words):
    from qat.cli.flags import checkpoint_of

    for how in ("a.pth", "--ckpt a.pth"):
        assert checkpoint_of(parser.parse_args(words.format(how).split())) == Path("a.pth")
    for how in ("", "a.pth --ckpt b.pth"):
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(words.format(how).split())
        assert exit_.value.code == 2


def test_a_data_sets_split_is_named_with_it_or_for_all(tmp_path):
    from qat.cli.flags import data_sets
    from qat.core.errors import UserError

    colon = tmp_path / "a:b"
    colon.mkdir()

    def split(*data, split=None):
        return data_sets(argparse.Namespace(data=data, split=split))

    assert split("x:fit", "y:more") == [(Path("x"), "fit"), (Path("y"), "more")]
    assert split("x", "y:more", split="fit") == [(Path("x"), "fit"), (Path("y"), "more")]
    assert split(str(colon), split="fit") == [(colon, "fit")]
    with pytest.raises(UserError, match="expected ROOT:SPLIT"):
        split("x")


def test_the_parsers_of_all_verbs_do_not_bring_torch():
    script = "import sys; from qat.cli.parser import make_parser; make_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_configs_in_python_are_refused_on_request(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert main(["calibrate", "--config", str(config), "--ckpt", "model.pth", "--no-python-config"]) == 2
    error = capsys.readouterr().err
    assert str(config) in error and "expected YAML" in error
    assert not (tmp_path / "ran").exists()
