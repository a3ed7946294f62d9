"""qattn attend and qattn compare, run as a person runs them."""

import json
import sys

import numpy as np
import pytest

import qattn
from qattn.cli import attend, main
from tests import tiny_model

TEXT = "hello world, hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same with coarser attention weights, and two that are different."""
    path, weights = tmp_path_factory.mktemp("models"), tiny_model.weights()
    coarse = {
        name: np.asarray(qattn.quantize(w, "Q4_0")) if ".attn_" in name and w.ndim == 2 else w
        for name, w in weights.items()
    }
    tiny_model.write(path / "tiny.gguf", weights, llama__context_length=512)
    tiny_model.write(path / "coarse.gguf", coarse)
    tiny_model.write(path / "mamba.gguf", architecture="mamba")
    shorter = {name: w for name, w in weights.items() if not name.startswith("blk.1.")}
    tiny_model.write(path / "shorter.gguf", shorter, llama__block_count=1)
    return path


@pytest.fixture
def run(capsys, folder, monkeypatch):
    """Run a command line in the folder → (exit code, standard output, standard error)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def cells(out):
    """The rows of a table that begin with a number."""
    return [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]


# attend


def test_attend_tells_of_layers_and_then_of_heads(run):
    code, out, _ = run("attend", "tiny.gguf", TEXT)
    assert code == 0 and "Layers: means over" in out and "entropy" in out
    assert [row[0] for row in cells(out)] == ["0", "1"]
    code, out, _ = run("attend", "tiny.gguf", TEXT, "--layer", 1)
    rows = cells(out)
    assert code == 0 and "Heads of layer 1" in out and [row[0] for row in rows] == list("0123")
    assert all(0 < float(row[1]) < 3 and row[3].endswith("%") and row[4] == "0.0%" for row in rows)


def test_a_map_has_a_line_and_two_columns_for_each_token(run):
    code, out, _ = run("attend", "tiny.gguf", TEXT, "--layer", 0, "--head", 2, "--precision", "exact")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("layer 0, head 2") and lines[-1].startswith("weight: ·")
    tokens = lines[2:-1]
    labels = ["hello", "␣w", "o", "r", "l", "d", ",", "␣", "hello"]
    assert [line.split()[:2] for line in tokens] == [[str(n), label] for n, label in enumerate(labels)]
    shades = [line[19:] for line in tokens]
    assert [len(row) for row in shades] == [2 * (n + 1) for n in range(9)] and shades[0] == "██"
    assert all(row[0::2] == row[1::2] and set(row) <= set("·░▒▓█") for row in shades)


def test_shades_follow_the_weights():
    shown = "".join(map(attend._shade, (0, 1e-9, 0.049, 0.05, 0.19, 0.2, 0.39, 0.4, 0.69, 0.7, 1)))
    assert shown == " ··░░▒▒▓▓██"


def test_a_text_that_is_too_long_for_a_map_gives_its_strongest_links(run):
    code, out, _ = run("attend", "tiny.gguf", "hello world " * 10, "--layer", 0, "--head", 1)
    assert code == 0 and "strongest links" in out and max(map(len, out.splitlines())) <= 80
    rows = cells(out)
    weights = [float(row[-2]) for row in rows]
    assert len(rows) == 20 and weights == sorted(weights, reverse=True) and 0 < weights[0] <= 1
    assert all(int(row[0]) - int(row[2]) == int(row[-1]) >= 0 and row[2] != "0" for row in rows)


def test_attend_draws_one_head_or_all(run, folder, tmp_path):
    one, many = tmp_path / "one.png", tmp_path / "many.svg"
    code, _, err = run("attend", "tiny.gguf", "$x$ \t\x1b é", "--layer", 0, "--head", 1, "--out", one)
    assert code == 0 and err.endswith(f"wrote {one}\n") and one.read_bytes().startswith(b"\x89PNG")
    assert run("attend", "tiny.gguf", TEXT, "--layer", 0, "--out", many)[0] == 0
    assert b"<svg" in many.read_bytes()
    before = one.read_bytes()
    code, out, err = run("attend", "tiny.gguf", TEXT, "--layer", 0, "--head", 1, "--out", one)
    assert (code, out, err) == (2, "", f"qattn attend: {one} exists; --force overwrites it\n")
    assert one.read_bytes() == before
    assert run("attend", "tiny.gguf", TEXT, "--layer", 0, "--head", 1, "--out", one, "--force")[0] == 0
    assert one.read_bytes() != before


def test_labels_are_one_printable_line():
    pieces = [b" the", b"\n\n", b"\xe2\x82", b"\x1b[31m", "é".encode(), "\u200b".encode()]
    assert [attend.label(piece) for piece in pieces] == ["␣the", "↵↵", "\\xe2\\x82", "\\x1b[31m", "é", "\\u200b"]


def test_attend_takes_the_default_model(run, smollm2):
    code, out, _ = run("attend", "The cat sat on the mat.", "--layer", 5, "--head", 3)
    assert code == 0 and "␣cat" in out and out.splitlines()[2].startswith("  0 The            ██")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/none.gguf", TEXT], "/none.gguf: No such file or directory\n"),
        ([__file__, TEXT], f"{__file__}: not a GGUF file"),
        (["tiny.gguf"], "there is no text for tiny.gguf; say FILE and TEXT, one behind the other\n"),
        (["tiny.gguf", ""], "the text is empty; heads need something to attend to\n"),
        (["tiny.gguf", TEXT, "--layer", "2"], "layer is 2; the model has layers 0 to 1\n"),
        (["tiny.gguf", TEXT, "--layer", "1", "--head", "4"], "--head is 4; layer 1 has heads 0 to 3\n"),
        (["tiny.gguf", TEXT, "--head", "1"], "--head is for one layer; say which with --layer\n"),
        (["tiny.gguf", TEXT, "--out", "a.png"], "--out is for one layer; say which with --layer\n"),
        (
            ["tiny.gguf", TEXT, "--layer", "0", "--out", "a.gif"],
            "a.gif ends in '.gif'; expected .png or .svg or .pdf\n",
        ),
        (["tiny.gguf", TEXT, "--layer", "0", "--out", "/no/a.png"], "/no is not a directory, so a.png can't be"),
        (["tiny.gguf", "hello" * 600], "600 tokens don't fit into the cache of 512"),
    ],
)
def test_what_attend_can_not_do_is_one_line(run, argv, message):
    code, out, err = run("attend", *argv)
    assert code == 2 and out == "" and err.startswith(f"qattn attend: {message}") and err.count("\n") == 1


def test_without_matplotlib_a_picture_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("attend", "tiny.gguf", TEXT, "--layer", 0, "--out", tmp_path / "a.png")
    assert code == 2 and "matplotlib is not installed; get it with: pip install 'qattn[plot]'" in err


# compare


def test_compare_tells_layer_by_layer_what_was_lost(run, tmp_path):
    target, picture = tmp_path / "costs.json", tmp_path / "costs.png"
    code, out, err = run("compare", "tiny.gguf", "coarse.gguf", TEXT, "--json", target, "--out", picture)
    assert code == 0 and f"wrote {target}\nwrote {picture}\n" in err and picture.read_bytes().startswith(b"\x89PNG")
    assert "coarse.gguf against tiny.gguf, over 9 tokens" in out and max(map(len, out.splitlines())) <= 80
    found = json.loads(target.read_text())
    assert found["tokens"] == 9 and [layer["layer"] for layer in found["layers"]] == [0, 1]
    for row, layer in zip(cells(out), found["layers"], strict=True):
        assert row[1:4] == ["Q8_0", "→", "Q8_0"] and row[4] == f"{layer['nmse']:.2e}"
        assert 1e-4 < layer["nmse"] < 0.1 and len(layer["kl"]) == 4
        assert row[5] == f"{np.mean(layer['kl']):.2e}" and row[7] == f"{max(layer['kl']):.2e}"


def test_a_file_costs_nothing_against_itself(run, tmp_path):
    picture = tmp_path / "none.png"
    code, out, _ = run("compare", "tiny.gguf", "tiny.gguf", TEXT, "--out", picture)
    assert code == 0 and [row[4:6] for row in cells(out)] == [["0.00e+00", "0.00e+00"]] * 2
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tiny.gguf", "/none.gguf", TEXT], "/none.gguf: No such file or directory\n"),
        (["tiny.gguf", __file__, TEXT], f"{__file__}: not a GGUF file"),
        (
            ["tiny.gguf", "mamba.gguf", TEXT],
            "mamba.gguf can't be compared with tiny.gguf: the architecture is 'mamba',",
        ),
        (["tiny.gguf", "shorter.gguf", TEXT], "shorter.gguf can't be compared with tiny.gguf: there is no blk.1.attn_"),
        (["shorter.gguf", "tiny.gguf", TEXT], "tiny.gguf can't be compared with shorter.gguf: there is blk.1.attn_out"),
        (["tiny.gguf", "coarse.gguf", ""], "the text is empty; layers need something to compute\n"),
        (["tiny.gguf", "coarse.gguf", TEXT, "--json", "a.txt"], "a.txt ends in '.txt'; expected .json\n"),
        (["tiny.gguf", "coarse.gguf", TEXT, "--out", "tiny.gguf"], "tiny.gguf ends in '.gguf'; expected .png or"),
    ],
)
def test_what_compare_can_not_do_is_one_line(run, argv, message):
    code, out, err = run("compare", *argv)
    assert code == 2 and out == "" and err.startswith(f"qattn compare: {message}") and err.count("\n") == 1


def test_compare_never_overwrites_unasked(run, tmp_path):
    target = tmp_path / "costs.json"
    target.write_text("mine")
    arguments = ("compare", "tiny.gguf", "coarse.gguf", TEXT, "--json", target)
    code, out, err = run(*arguments)
    assert (code, out, err) == (2, "", f"qattn compare: {target} exists; --force overwrites it\n")
    assert target.read_text() == "mine"
    assert run(*arguments, "--force")[0] == 0 and json.loads(target.read_text())["layers"]
