"""Where the answer goes: streams of any encoding, closed or full, and files that are checked before the work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, first
from test_cli import call
from tokenizers import Tokenizer as Fast

import generate
from nanokv import load
from nanokv.files import replacing
from nanokv.save import restore

BASE = ["-p", "hello", "-n", "6", "--dtype", "float32", "--ignore-eos"]


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    """A small checkpoint every token of which is a character beyond Latin-1."""
    path = tmp_path_factory.mktemp("streams") / "m"
    shutil.copytree(tiny("g3")[0], path)
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "✓"}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    assert Fast.from_file(str(path / "tokenizer.json")).decode([3, 4]) != ""
    return path


def shell(path, command: str, encoding: str = "utf-8", **options) -> subprocess.CompletedProcess:
    """Run generate.py by a shell; `command` follows its usual arguments, redirections included."""
    line = " ".join([sys.executable, "generate.py", "--model", str(path), *BASE, command])
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(line, shell=True, cwd=ROOT, env=env, capture_output=True, timeout=120, **options)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", first(1, ["ascii", "utf-8", "cp1252"]))
def test_what_a_terminal_cannot_show_is_replaced(path, encoding):
    done = shell(path, "--explain", encoding)
    assert done.returncode == 0, done.stderr
    right = b"?" * 6 if encoding != "utf-8" else "✓".encode() * 6
    assert done.stdout.replace(b" ", b"") == right + b"\n"
    assert b"kv: " in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["--list-policies", "--help", "--list-models", "--plan"])
def test_lists_and_help_are_shown_in_an_ascii_terminal(path, command):
    done = shell("smollm2-135m", command, "ascii")
    assert done.returncode == 0 and len(done.stdout) > 500, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("redirection", first(1, ["0<&- 2>&-", "2>/dev/full", "2>&-", "<&-"]))
def test_no_answer_is_lost_because_another_stream_is_closed_or_full(path, redirection):
    done = shell(path, redirection)
    assert (done.returncode, done.stdout.decode().replace(" ", "")) == (0, "✓" * 6 + "\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [(">/dev/full", "No space left on device"), (">&-", "is closed")])
def test_an_answer_without_a_place_is_kept_in_a_file(path, tmp_path, case):
    redirection, says = case
    done = shell(path, f"--json {tmp_path}/o.json {redirection}")
    assert done.returncode == (0 if redirection == ">&-" else 2) and b"Exception ignored" not in done.stderr
    assert (says.encode() in done.stderr) == (redirection != ">&-") and b"Traceback" not in done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["text"].replace(" ", "") == "✓" * 6


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [(">/dev/full", "No space left on device"), (">&-", "is closed")])
def test_an_answer_without_any_place_is_refused_in_a_sentence(path, case):
    redirection, says = case
    done = shell(path, redirection)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"generate.py: ") == 1 and says.encode() in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


@pytest.mark.slow
def test_help_without_a_place_is_refused_in_a_sentence(path):
    done = shell(path, "--help >/dev/full")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr
    done = shell(path, "--list-models >/dev/full")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_one_line_in_another_encoding_does_not_end_a_conversation(path, encoding):
    settings = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = b"hello\n" + "Käse\n".encode("latin-1") + b"more\n"
    command = [sys.executable, "generate.py", "--model", str(path), "--interactive", "-n", "4", "--ignore-eos"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=env, input=lines, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2, done.stderr
    assert done.stderr.count(b"the text is not UTF-8") == 1
    (path / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"\xef\xbb\xbfhello", "hello"),
        (b"hello\r\n", "hello"),
        (b"hello\n", "hello"),
        (b"a\r\nb\r\n", "a\r\nb"),
        (b"hello\r", "hello\r"),
        (b"hello\n\n", "hello\n"),
    ],
)
def test_a_prompt_file_may_begin_with_a_byte_order_mark_and_end_as_on_windows(content, prompt, tmp_path):
    from nanokv.cli import read_prompt

    (tmp_path / "p.txt").write_bytes(content)
    args = generate.parser().parse_args(["--prompt-file", str(tmp_path / "p.txt")])
    assert read_prompt(args) == prompt


# ---- files ----


@pytest.mark.parametrize("flag", ["--json", "--save-cache", "--xray"])
def test_a_place_that_cannot_be_written_is_told_before_a_model_is_loaded(flag, tmp_path, capsys):
    (tmp_path / "to nowhere").symlink_to(tmp_path / "none" / "x")
    (tmp_path / "read only").write_text("")
    (tmp_path / "read only").chmod(0o400)
    places = ["-", str(tmp_path), str(tmp_path / "none" / "x"), str(tmp_path / "to nowhere")]
    if os.geteuid():
        places.append(str(tmp_path / "read only"))
    for place in places:
        status, out, err = call(capsys, "--model", "no such model", *BASE, flag, place)
        assert (status, out, err.count("\n")) == (2, "", 1) and flag in err and "no such model" not in err, err


def test_two_outputs_in_one_file_are_refused_and_so_is_the_prompt_as_one(tmp_path, capsys):
    file = tmp_path / "x"
    file.write_text("a prompt")
    (tmp_path / "link").symlink_to(file)
    _, _, err = call(capsys, *BASE, "--json", file, "--xray", tmp_path / "link")
    assert f"--xray and --json name the same file {tmp_path / 'link'}; give two files" in err
    _, _, err = call(capsys, "--prompt-file", file, "--json", file)
    assert "--json and --prompt-file name the same file" in err and file.read_text() == "a prompt"


def test_a_symbolic_link_stays_one(path, tmp_path, capsys):
    for flag in ("--json", "--save-cache", "--xray"):
        (tmp_path / flag).write_text("old")
        (tmp_path / f"{flag}.link").symlink_to(tmp_path / flag)
        assert call(capsys, "--model", path, *BASE, flag, tmp_path / f"{flag}.link")[0] == 0
        assert (tmp_path / f"{flag}.link").is_symlink() and (tmp_path / flag).read_bytes() != b"old"
    assert restore(load(str(path), dtype="float32"), tmp_path / "--save-cache", 2).seen == [5]
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.endswith(".part")) == []


def test_a_device_or_a_pipe_is_written_to_and_never_replaced(path, tmp_path, capsys):
    import stat
    import threading

    assert call(capsys, "--model", path, *BASE, "--json", "/dev/null", "--xray", "/dev/null")[0] == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_text()))
    reader.start()
    assert call(capsys, "--model", path, *BASE, "--json", fifo)[0] == 0
    reader.join(60)
    assert len(json.loads(read[0])["token_ids"]) == 6 and stat.S_ISFIFO(os.stat(fifo).st_mode)
    status, _, err = call(capsys, "--model", path, *BASE, "--save-cache", fifo)
    assert status == 2 and "is no regular file" in err and stat.S_ISFIFO(os.stat(fifo).st_mode)


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_the_file_behind_a_stream_is_never_replaced(path, tmp_path):
    log = tmp_path / "log"
    for flag, stream, redirection in (
        ("--json", "/dev/stdout", f">>{log}"),
        ("--xray", "/dev/stderr", f"2>>{log}"),
        ("--save-cache", str(log), f"<{log}"),
    ):
        log.write_text("earlier\n")
        done = shell(path, f"{flag} {stream} {redirection}")
        assert done.returncode == 2 and log.read_text().startswith("earlier\n")
        assert f"{flag} and standard" in done.stderr.decode() + log.read_text()
    done = shell(path, "--json /dev/stdout")  # a pipe: the record follows the text
    assert done.returncode == 0 and b'"token_ids"' in done.stdout


def test_an_output_never_replaces_what_the_run_reads(path, tmp_path, capsys):
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        _, _, err = call(capsys, "--model", path, *BASE, "--json", path / name)
        assert f"--json and --model's {name} name the same file" in err
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    assert call(capsys, "--model", path, *BASE, "--save-cache", tmp_path / "c")[0] == 0
    flags = ["--model", path, "--load-cache", tmp_path / "c", "-p", "x", "-n", "2", "--dtype", "float32"]
    assert "--json and --load-cache name the same file" in call(capsys, *flags, "--json", tmp_path / "c")[2]
    assert call(capsys, *flags, "--save-cache", tmp_path / "c")[0] == 0


@pytest.mark.parametrize(
    "flag", ["--load-cache", "--save-cache", "--json", "--xray", "--compare", "--policy", "--stop"]
)
def test_an_empty_value_is_refused(flag, capsys):
    status, _, err = call(capsys, "--model", "no such model", "-p", "x", flag, "")
    assert status == 2 and f"{flag} is empty" in err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_output_is_tried_before_an_error_is_told(path, tmp_path):
    done = shell(path, f"--json {tmp_path}/o.json --xray /dev/full")
    assert done.returncode == 2 and b"--xray /dev/full cannot be written" in done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["token_ids"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_cache_is_saved_though_the_answer_has_no_place(path, tmp_path):
    assert shell(path, f"--save-cache {tmp_path}/a").returncode == 0
    done = shell(path, f"--load-cache {tmp_path}/a --save-cache {tmp_path}/b >/dev/full")
    assert done.returncode == 2 and b"No space left" in done.stderr
    assert restore(load(str(path), dtype="float32"), tmp_path / "b", 1).seen == [5 + 5 + 6]


@pytest.mark.slow
@pytest.mark.parametrize("what", first(1, ["--save-cache c", "--interactive", "--plan", "--list-policies"]))
def test_nothing_runs_for_nobody(path, what):
    done = shell(path, f"{what} >&-")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"standard output is closed" in done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("redirection", [">/dev/full", "| head -c0", ">&-"])
def test_the_benchmarks_file_is_written_whoever_reads_the_tables(path, tmp_path, redirection):
    line = (
        f"{sys.executable} bench.py prose --model {path} --lengths 1000 --plans streaming --quiet --json {tmp_path}/a"
    )
    done = subprocess.run(f"{line} {redirection}", shell=True, cwd=ROOT, capture_output=True, timeout=120)
    assert json.loads((tmp_path / "a").read_text())["what"] == "prose", done.stderr


@pytest.mark.slow
def test_a_benchmark_for_nobody_is_refused(path):
    command = f"{sys.executable} bench.py prose --model {path} --lengths 1000 --plans streaming --quiet >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 2 and b"standard output is closed" in done.stderr
