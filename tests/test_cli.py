"""The command line, run as a person runs it."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qattn.cli import main
from tests import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", llama__context_length=4096))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model without a token that ends the text."""
    changes = {"tokenizer__ggml__token_type": None, "tokenizer__ggml__eos_token_id": None}
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    return str(tiny_model.write(path, llama__context_length=100_000, **changes))


@pytest.fixture
def run(capsys):
    """Run a command line → (exit code, standard output, standard error)."""

    def run(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def in_another_process(*argv, **options):
    command = [sys.executable, "-m", "qattn", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# generate


def test_generate_continues_the_prompt_and_then_tells_the_speed(run, tiny):
    code, out, err = run("generate", "hello w", "--model", tiny, "--max-tokens", 8, "--seed", 1)
    assert code == 0 and out.startswith("hello w") and out.endswith("\n")
    assert re.search(r"prompt: 2 tokens, [\d.]+ tokens/s\ngeneration: \d tokens, [\d.]+ tokens/s\n", err)


def test_the_seed_repeats_the_text(run, tiny):
    options = ("--model", tiny, "--max-tokens", 12, "--temperature", 2)
    first, second, other = (run("generate", "h", *options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != other


def test_the_options_of_sampling_arrive(run, tiny):
    options = ("--model", tiny, "--max-tokens", 12, "--temperature", 2)
    greedy = run("generate", "h", "--model", tiny, "--max-tokens", 12, "--temperature", 0)[1]
    assert run("generate", "h", *options, "--top-k", 1)[1] == greedy
    assert run("generate", "h", *options, "--top-p", 1e-6)[1] == greedy
    assert run("generate", "h", *options, "--min-p", 1)[1] == greedy
    assert run("generate", "h", *options, "--precision", "exact", "--threads", 1, "--top-k", 1)[0] == 0


def test_a_chat_answers_without_repeating_the_prompt(run, tiny):
    code, out, err = run("generate", "hello", "--model", tiny, "--chat", "--system", "be brief", "--max-tokens", 3)
    assert code == 0 and "hello" not in out
    prompt = "<|start|>system: be brief<|im_end|><|start|>user: hello<|im_end|><|start|>assistant: "
    expected = len(tiny_model_tokens(tiny, prompt))
    assert f"prompt: {expected} tokens" in err


def tiny_model_tokens(path, text):
    from qattn.models import Tokenizer

    return Tokenizer.from_gguf(path).encode(text, special=True)


def test_a_prompt_can_come_from_a_file_or_standard_input(run, tiny, tmp_path, monkeypatch):
    import io

    (tmp_path / "prompt").write_text("hello hello")
    assert run("generate", f"@{tmp_path / 'prompt'}", "--model", tiny, "--max-tokens", 1)[1].startswith("hello hello")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hell"))
    assert run("generate", "-", "--model", tiny, "--max-tokens", 1)[1].startswith("hell")


def test_without_a_model_the_default_one_writes(run, smollm2):
    code, out, _ = run("generate", "The capital of France is", "--temperature", 0, "--max-tokens", 5)
    assert code == 0 and "Paris" in out


# Errors: one line, exit code 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", ""], "qattn generate: the prompt is empty; give the model something to continue\n"),
        (["generate", "x", "--model", "/none.gguf"], "qattn generate: /none.gguf: No such file or directory\n"),
        (["generate", "x", "--temperature", "-1"], "qattn generate: temperature is -1.0; expected 0 (greedy) or"),
        (["generate", "x", "--system", "y"], "qattn generate: --system is a message of a chat; add --chat\n"),
        (["generate", "@/none"], "qattn generate: /none: No such file or directory\n"),
        (["inspect", __file__], f"qattn inspect: {__file__}: not a GGUF file: it starts with"),
        (["perplexity", "/none.gguf", "text"], "qattn perplexity: /none.gguf: No such file or directory\n"),
    ],
)
def test_an_error_is_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert code == 2 and out == "" and err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "x", "--threads", "0"], "--threads is 0; expected at least 1"),
        (["generate", "hello" * 4096, "--max-tokens", "1"], "the prompt has 4096 tokens, but"),
        (["generate", "x", "--max-tokens", "-1"], "max_tokens is -1; expected at least 0"),
    ],
)
def test_an_error_of_the_model_is_one_line_too(run, tiny, argv, message):
    path = tiny if "4096" not in message else str(Path(tiny).with_name("short.gguf"))
    if path != tiny:
        tiny_model.write(Path(path))
    code, _, err = run(*argv, "--model", path)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_that_is_not_supported_is_refused_before_it_is_loaded(run, tmp_path):
    path = tiny_model.write(tmp_path / "m.gguf", architecture="mamba")
    code, _, err = run("generate", "x", "--model", path)
    assert code == 2 and "there is no decoder for architecture 'mamba'" in err


def test_the_traceback_is_there_for_who_asks(tiny, monkeypatch):
    monkeypatch.setenv("QATTN_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["generate", "x", "--model", "/none.gguf"])


def test_a_missing_command_shows_what_there_is(capsys):
    assert main([]) == 2
    error = capsys.readouterr().err
    assert "usage: qattn" in error and "inspect" in error
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in ("fetch", "generate", "inspect", "perplexity"))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_ends_politely(endless):
    # a shell may have started these tests with the signal ignored, as it does in the background
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = in_another_process("generate", "h", "--model", endless, "--max-tokens", 90_000, preexec_fn=heed)
    assert process.stdout.read(20).startswith("h")  # tokens flow: what Numba compiles is compiled
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and err.endswith("interrupted\n") and "generation:" in err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX pipes")
def test_a_closed_pipe_ends_quietly(endless):
    process = in_another_process("generate", "h", "--model", endless, "--max-tokens", 90_000)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 2
    assert "Traceback" not in process.stderr.read()


# inspect


def test_inspect_says_what_is_inside_and_whether_it_is_supported(run, tiny):
    code, out, _ = run("inspect", tiny)
    assert code == 0
    assert "tensors: supported (F32, Q8_0)" in out and "attention: supported (llama, 2 layers)" in out
    assert "decoder: supported" in out
    assert "llama.embedding_length" in out and "265 × string" in out
    layers = [line.split() for line in out.splitlines() if "4/2×16" in line]
    assert layers == [[str(n), "4/2×16", "128×64", "Q8_0", "64×64", "Q8_0", "8.50", "13.1", "kB"] for n in range(2)]


def test_inspect_fits_80_columns_in_a_pipe(run, smollm2, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, _ = run("inspect", smollm2)
    assert code == 0
    lines = out.splitlines()[1:]  # the path is as long as it is
    assert max(map(len, lines)) <= 80
    assert sum("9/3×64" in line for line in lines) == 30
    assert "llama.attention.layer_norm_rms_epsilon" in out
    assert "\x1b" not in out


def test_inspect_shows_mixed_formats_and_what_is_not_supported(run, tmp_path):
    import numpy as np

    tensors = tiny_model.weights()
    tensors["blk.0.attn_v.weight"] = tensors["blk.0.attn_v.weight"].reshape(-1)  # stored as F32, and no matrix any more
    tensors["blk.0.attn_sinks.weight"] = np.ones(4, np.float32)
    code, out, _ = run("inspect", tiny_model.write(tmp_path / "m.gguf", tensors, architecture="gpt-oss"))
    assert code == 0
    assert "attention: NOT supported" in out and "decoder: NOT supported: there is no decoder for architecture" in out


def test_brackets_in_metadata_are_shown_as_they_are(run, tmp_path):
    code, out, _ = run("inspect", tiny_model.write(tmp_path / "m.gguf", general__name="[bold]x[/nothing]"))
    assert code == 0 and "[bold]x[/nothing]" in out


# perplexity, fetch


def test_perplexity_of_a_text_and_of_a_file(run, tiny, tmp_path):
    text = "hello world, hello world"
    code, out, err = run("perplexity", tiny, text)
    assert code == 0 and "tokens/s" in err
    assert re.fullmatch(r"perplexity [\d.]+ ± [\d.]+ over \d+ tokens\n", out)
    (tmp_path / "text").write_text(text)
    assert run("perplexity", tiny, f"@{tmp_path / 'text'}", "--context", 4096)[1] == out


def test_smollm2_predicts_english_better_than_noise(run, smollm2):
    english = run("perplexity", smollm2, "The quick brown fox jumps over the lazy dog. The dog does not mind.")[1]
    noise = run("perplexity", smollm2, "fox the mind quick lazy over not does brown dog the jumps The. dog The.")[1]
    assert float(english.split()[1]) < float(noise.split()[1]) / 5


def test_fetch_prints_the_path(run, smollm2):
    assert run("fetch") == (0, f"{smollm2}\n", "")
