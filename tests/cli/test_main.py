"""What holds for every command: exit codes, one sentence on standard error, help, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import transformers_sgl
from transformers_sgl.cli import main

QUESTION = "describe the red triangle."
COMMANDS = ("run", "visualize", "batch", "calibrate", "evaluate", "serve", "publish")


def piped(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose output is read by a program."""
    forced = ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")  # these change what rich prints
    clean = {name: value for name, value in os.environ.items() if name not in forced}
    command = [sys.executable, "-m", "transformers_sgl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**clean, **environment})


def test_ctrl_c_is_one_sentence(capsys, example, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_sgl.opening.open_pair", stopped)
    assert main(["run", example, QUESTION]) == 130
    assert capsys.readouterr() == ("", "transformers-sgl: Stopped.\n")


def test_module_runs_as_a_command():
    process = piped("run", "missing.png", QUESTION)
    assert process.returncode == 2
    assert process.stderr == "transformers-sgl: There is no image file 'missing.png'.\n"


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{transformers_sgl.__version__}\n"


def test_a_fault_of_ours_keeps_its_traceback(example, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("transformers_sgl.opening.open_pair", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["run", example, QUESTION])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Missing command (see `transformers-sgl --help`)."),
        (("rnu",), "No such command 'rnu'. Did you mean 'run'? (see `transformers-sgl --help`)."),
        (("plot",), "No such command 'plot' (see `transformers-sgl --help`)."),
        (("run",), "Missing argument 'IMAGE' (see `transformers-sgl run --help`)."),
        (("run", "image.png"), "Missing argument 'QUESTION' (see `transformers-sgl run --help`)."),
        (("run", "image.png", "what?", "how?"), "how?"),
        (("run", "image.png", "what?", "--presett", "fast"), "No such option: --presett"),
        (("run", "image.png", "what?", "--preset", "slow"), "'slow' is not one of 'quality', 'balanced', 'fast'"),
        (("run", "image.png", "what?", "--dtype", "int8"), "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        (("run", "image.png", "what?", "--retention", "some"), "Invalid value for '--retention'"),
        (("run", "image.png", "what?", "--model"), "'--model' requires an argument"),
        (("visualize", "image.png", "what?", "--frames", "few"), "Invalid value for '--frames'"),
        (("batch", "questions.jsonl"), "Missing option '--output'"),
        (("calibrate", "pair", "--out", "out"), "Missing option '--data'"),
        (("evaluate", "pair", "--data", "scenes"), "Missing option '--out'"),
        (("serve",), "Missing argument 'MODEL'"),
        (("serve", "--port", "0", "pair"), "Invalid value for '--port'"),
        (("publish", "pair"), "Missing option '--repo'"),
        (("publish", "pair", "--repo", "me/pair", "--recipe", "--bundle"), "exclude each other"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("transformers-sgl: ")
    assert sentence in err
    assert err.endswith(".\n")
    assert err.count("\n") == 1


class TestHelp:
    def test_lists_the_commands(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert "Answers a question about an image" in out
        assert "Chooses the early-exit threshold" in out

    def test_groups_the_commands(self):
        lines = [
            re.split(r"[─╮]{2,}", line[3:])[0].strip() for line in piped("--help").stdout.splitlines() if "╭" in line
        ]
        assert lines == ["Options", "Answer questions", "Measure on many questions", "Offer to others"]

    @pytest.mark.parametrize("width", ["80", "2000"])
    def test_names_every_option_whole_and_uncoloured_where_a_program_reads_it(self, width):
        options = {
            "run": "preset retention prune-layer early-exit-threshold model max-new-tokens dtype device show compare",
            "visualize": "out video frames model max-new-tokens dtype device json",
            "batch": "output small-workers large-workers batch-size ray engine engine-options "
            "preset retention prune-layer model dtype json",
            "calibrate": "data out keep-accuracy large-call-budget confidence held-out seed batch-size json",
            "evaluate": "data out calibration columns limit calibration-limit methods retention metric keep-accuracy",
            "publish": "repo recipe bundle revision private dry-run json",
        }
        for command, names in options.items():
            text = piped(command, "--help", COLUMNS=width).stdout
            assert {f"--{name}" for name in names.split()} <= set(re.findall(r"--[\w-]+", text)), command
            assert "\x1b" not in text

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_one(self, capsys, command):
        assert main([command, "--help"]) == 0
        assert f"transformers-sgl {command}" in capsys.readouterr().out


class TestOutputThatNobodyReads:
    @pytest.mark.parametrize("arguments", [("--version",), ("run", "EXAMPLE", QUESTION, "--json")])
    def test_it_ends_quietly(self, example, arguments):
        """As in `transformers-sgl ... | head`, once `head` has seen enough."""
        arguments = [example if each == "EXAMPLE" else each for each in arguments]
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "transformers_sgl", *arguments]
        process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(writing)
        assert process.stderr == ""
        assert process.returncode in (1, 141)  # typer's own code, and the shell's for a broken pipe


class TestCompletion:
    def complete(self, line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        result = piped(_TRANSFORMERS_SGL_COMPLETE="complete_bash", **words)
        assert result.stderr == ""
        return [each.split(",")[-1] for each in result.stdout.split()]

    def test_commands_options_and_values(self):
        assert self.complete("transformers-sgl ") == list(COMMANDS)
        assert "--early-exit-threshold" in self.complete("transformers-sgl run --")
        assert self.complete("transformers-sgl run --preset ") == ["quality", "balanced", "fast", "confirmed"]

    def test_a_script_for_a_shell(self):
        result = piped("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
        assert result.returncode == 0
        assert "_TRANSFORMERS_SGL_COMPLETE" in result.stdout

    def test_it_is_installed(self, tmp_path):
        named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
        result = piped("--install-completion", "bash", **named)
        assert result.returncode == 0
        assert "bash completion installed" in result.stdout
        assert "transformers-sgl" in (tmp_path / ".bashrc").read_text()
