"""Settings are checked once, at the edge, with messages that say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runtime.cli import main
from runtime.config import Config
from runtime.config_file import load, parse
from runtime.config_reference import reference
from runtime.errors import ConfigError
from tests.conftest import ROOT

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modle": "x"}, "modle: unknown key; did you mean `model`?"),
    ({"front_end": {"prot": 1}}, "front_end.prot: unknown key; did you mean `port`?"),
    ({"decode": {"xyzzy": 1}}, "decode.xyzzy: unknown key; known here: "),
    ({"front_end": {"port": 0}}, "front_end.port: "),
    ({"front_end": {"host": ""}}, "front_end.host: "),
    ({"engine": "gpu"}, "engine: "),
    ({"prefill": {"replicas": 0}}, "prefill.replicas: "),
    ({"engine_args": {"model": "x"}}, "engine_args.model is set by Baton; remove it"),
    ({"decode": {"engine_args": {"kv_transfer_config": {}}}}, "decode.engine_args.kv_transfer_config is set by Baton"),
    ({"prefill": {"engine_args": {"dtype": "float16"}}}, "dtype is 'float16' on prefill and None on decode"),
    (
        {"prefill": {"engine_args": {"block_size": 16}}, "decode": {"engine_args": {"block_size": 32}}},
        "block_size is 16 on prefill and 32 on decode",
    ),
    ({"prefill": {"engine_args": {"kv_cache_dtype": "fp8"}}}, "kv_cache_dtype is 'fp8' on prefill"),
    (
        {"decode": {"engine_args": {"tensor_parallel_size": 2}}},
        "tensor_parallel_size is None on prefill and 2 on decode",
    ),
    (
        {"engine_args": {"tensor_parallel_size": 2}, "prefill": {"num_gpus": 1}, "decode": {"num_gpus": 2}},
        "set prefill.num_gpus to 2",
    ),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=[case[1][:40] for case in WRONG])
def test_wrong_settings_say_what_to_change(data: dict[str, Any], message: str) -> None:
    """Each problem is named by its key, with the fix where there is one."""
    with pytest.raises(ConfigError) as error:
        parse(data)
    assert message in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    """Nobody has to fix settings one run at a time."""
    with pytest.raises(ConfigError) as error:
        parse({"modle": "x", "front_end": {"port": -1}})
    assert "modle" in str(error.value) and "front_end.port" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "is not YAML"),
        (b"model: \xff\xfe", "is not YAML"),
        (b"model: 2024-13-45", "is not YAML"),
        (b"model: a\nmodel: b", "`model` is there twice"),
        (b"decode: {threads: 1, threads: 2}", "`threads` is there twice"),
        (b"- a", "not a list"),
        (b"[]", "not a list"),
        (b"false", "not a bool"),
        (None, "can't read"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, text: bytes | None, message: str) -> None:
    """Not there, not YAML or a key twice, not a mapping."""
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_holds_the_defaults(tmp_path: Path, text: str) -> None:
    """Every setting has one."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert load(path) == Config()


def test_a_key_may_replace_one_that_is_merged_in(tmp_path: Path) -> None:
    """YAML's `<<`, also of a mapping that has one itself, and the same key in two mappings."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        "prefill: &p {threads: 1, env: &e {A: x, B: y}}\n"
        "decode: &d {<<: *p, threads: 2, env: &f {<<: *e, A: z}}\n"
        "env: {<<: *f, B: w}\n"
    )
    config = load(path)
    assert (config.prefill.threads, config.decode.threads) == (1, 2)
    assert (dict(config.decode.env), dict(config.env)) == ({"A": "z", "B": "y"}, {"A": "z", "B": "w"})


@pytest.mark.parametrize(
    ("line", "key"), [(("--port", "99999"), "port"), (("--port", "-1"), "port"), (("--host", ""), "host")]
)
def test_where_to_listen_is_checked_on_the_command_line_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], key: str
) -> None:
    """As in the file: nothing is started, and the message names the setting."""
    import runtime.serving as serving

    served: list[Config] = []
    monkeypatch.setattr(serving, "serve_until_stopped", lambda config, address: served.append(config) or 0)
    path = tmp_path / "settings.yaml"
    path.write_text("model: /models/m\nfront_end: {replicas: 2}\n")
    assert main(["serve", "--config", str(path), *line]) == 2 and not served
    assert f"front_end.{key}: " in capsys.readouterr().err
    assert main(["serve", "--config", str(path), "--port", "9000", "--host", "::1"]) == 0
    front_end = served[0].front_end
    assert (front_end.port, front_end.host, front_end.replicas) == (9000, "::1", 2)


def test_settings_are_frozen() -> None:
    """Nobody changes settings after they were checked."""
    config = Config()
    with pytest.raises(ValidationError):
        config.model = "other"  # type: ignore[misc]


def test_a_pools_engine_arguments_go_over_the_common_ones() -> None:
    """Each role gets the common arguments, its own over them, and no other role's."""
    config = parse(
        {
            "model": "/models/m",
            "revision": "abc",
            "engine_args": {"max_num_seqs": 8, "enforce_eager": True},
            "prefill": {"engine_args": {"max_num_seqs": 4}, "env": {"A": "1"}, "threads": 3},
            "decode": {"threads": 5},
            "env": {"A": "0", "B": "2"},
        }
    )
    prefill, decode = config.engine_settings("prefill"), config.engine_settings("decode")
    assert (prefill.args["max_num_seqs"], decode.args["max_num_seqs"]) == (4, 8)
    assert prefill.args["revision"] == decode.args["revision"] == "abc"
    assert prefill.args["served_model_name"] == ["m"]
    assert (prefill.env["A"], decode.env["A"], decode.env["B"]) == ("1", "0", "2")
    assert (prefill.env["OMP_NUM_THREADS"], decode.env["OMP_NUM_THREADS"]) == ("3", "5")


@pytest.mark.parametrize(
    ("flags", "dtype"), [("fma avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("fma avx2", "float32")]
)
def test_a_cpu_engine_gets_the_dtype_that_its_machine_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    """Emulated bfloat16 would be far slower than float32; a dtype that is set stays, and GPUs have vLLM's default."""
    monkeypatch.setattr(Path, "read_text", lambda _: f"flags : {flags}")
    assert parse({"model": "/m"}).engine_settings("decode").args["dtype"] == dtype
    chosen = {"model": "/m", "engine_args": {"dtype": "float16"}}
    assert parse(chosen).engine_settings("decode").args["dtype"] == "float16"
    gpus = {"model": "/m", "prefill": {"num_gpus": 1}, "decode": {"num_gpus": 1}}
    assert "dtype" not in parse(gpus).engine_settings("decode").args


@pytest.mark.parametrize(
    ("keys", "expected"),
    [("one\n\n two \n", ("one", "two")), ("\n", None), (None, None)],
    ids=["two", "none", "missing"],
)
def test_api_keys_come_from_a_file_or_the_start_fails(
    tmp_path: Path, keys: str | None, expected: tuple[str, ...] | None
) -> None:
    """A configured source without keys is an error: it must not open the server."""
    path = tmp_path / "keys"
    if keys is not None:
        path.write_text(keys)
    config = parse({"front_end": {"api_keys_file": str(path)}})
    if expected is None:
        with pytest.raises(ConfigError):
            config.api_keys()
    else:
        assert config.api_keys() == expected


def test_api_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, separated by commas."""
    monkeypatch.setenv("KEYS", "a, b")
    assert parse({"front_end": {"api_keys_env": "KEYS"}}).api_keys() == ("a", "b")


@pytest.mark.parametrize("name", ["demo", "sim", "gpu"])
def test_the_settings_files_that_we_ship_are_right(name: str) -> None:
    """They load, and listen on loopback."""
    config = load(ROOT / f"deploy/config/{name}.yaml")
    assert config.front_end.host == "127.0.0.1"
    assert config.model_name == "SmolLM2-135M-Instruct"


def test_check_prints_each_roles_engine_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`baton check` shows what each engine will get; on a wrong file it exits with 2 and says why."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("model: /models/m\n")
    bad.write_text("modle: /models/m\n")
    assert main(["check", str(good)]) == 0
    printed = capsys.readouterr().out
    assert '"kv_role": "kv_producer"' in printed and '"kv_role": "kv_consumer"' in printed
    assert main(["check", str(bad)]) == 2
    assert "did you mean `model`?" in capsys.readouterr().err


def test_the_reference_of_settings_is_up_to_date() -> None:
    """docs/configuration.md is what `make docs` would write."""
    assert (ROOT / "docs/configuration.md").read_text() == reference()
