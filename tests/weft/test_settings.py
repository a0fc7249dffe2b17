"""Settings refuse what they do not know, and say which it was."""

from __future__ import annotations

import pytest

from weft import settings as s
from weft.errors import SettingsError

# What a user runs, beside the services.
COMMANDS = (s.UpSettings, s.ChatSettings, s.TopSettings, s.DrainSettings, s.PolicySettings)


def test_defaults_need_nothing() -> None:
    loaded = s.load(s.SchedulerSettings, [], {})
    assert loaded.mesh.nats_url == "nats://127.0.0.1:4222"
    assert loaded.route == "least_prefill"


def test_flag_wins_over_environment() -> None:
    environ = {"WEFT_MAX_QUEUED_REQUESTS": "5", "WEFT_ROUTE": "round_robin"}
    loaded = s.load(s.SchedulerSettings, ["--route", "least_loaded"], environ)
    assert (loaded.route, loaded.max_queued_requests) == ("least_loaded", 5)


@pytest.mark.parametrize("argv", [["a", "b", "--model", "m"], ["--model", "m", "a", "b"], ["a", "--model", "m", "b"]])
def test_words_and_flags_come_in_any_order(argv: list[str]) -> None:
    loaded, words = s.load_with_words(s.PolicySettings, argv, {}, prog="weft policy")
    assert (loaded.model, words) == ("m", ["a", "b"])


@pytest.mark.parametrize(
    ("argv", "environ", "sentence"),
    [
        ([], {"WEFT_PROT": "1"}, "WEFT_PROT: no such setting; did you mean WEFT_PORT?"),
        ([], {"WEFT_PORT": "many"}, "WEFT_PORT: 'many' is no whole number"),
        (["--port", "70000"], {}, "--port: 70000 is more than 65535"),
        (["--port", "-1"], {}, "--port: -1 is less than 0"),
        (["--max-body-size", "9 apples"], {}, "--max-body-size: '9 apples' is no size such as 256MiB or 2GiB"),
        (["--log-level", "loud"], {}, "--log-level: 'loud' is none of debug, info, warning, error"),
        (["--wait-for-role-s", "nan"], {}, "--wait-for-role-s: nan is less than 0"),
        (["--prot", "1"], {}, "unrecognized arguments: --prot 1 (see `weft --help`)"),
    ],
)
def test_a_mistake_is_named(argv: list[str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        s.load(s.GatewaySettings, argv, environ)
    assert caught.value.message == sentence


def test_a_setting_of_another_role_is_no_mistake() -> None:
    s.load(s.GatewaySettings, [], {"WEFT_MAX_NUM_SEQS": "8"})


def test_secrets_are_no_flags() -> None:
    with pytest.raises(SettingsError):
        s.load(s.GatewaySettings, ["--nats-password", "x"], {})
    assert s.load(s.GatewaySettings, [], {"WEFT_NATS_PASSWORD": "x"}).mesh.nats_password == "x"


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("1000", 1000), ("256MiB", 2**28), ("1.5 gib", 3 * 2**29)])
def test_sizes_have_units(text: str, size: int) -> None:
    assert s.parse_size(text) == size


@pytest.mark.parametrize(("text", "value"), [("60%", 0.6), ("0.25", 0.25), ("100%", 1.0), ("2GiB", 2**31), ("0", 0)])
def test_memory_is_a_size_or_a_share(text: str, value: float) -> None:
    loaded = s.load(s.WorkerSettings, ["--kv-memory", text], {})
    assert loaded.kv_memory == value and type(loaded.kv_memory) is type(value)
    again = s.load(s.WorkerSettings, [], {"WEFT_KV_MEMORY": s.to_environ(loaded)["WEFT_KV_MEMORY"]})
    assert again.kv_memory == value


@pytest.mark.parametrize("text", ["0%", "101%", "60 percent", "-1"])
def test_memory_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--kv-memory"):
        s.load(s.WorkerSettings, [f"--kv-memory={text}"], {})


@pytest.mark.parametrize("cls", [cls for cls in s.ALL_SETTINGS if cls is not s.UpSettings])
def test_settings_survive_the_way_to_a_child_process(cls: type) -> None:
    loaded = s.load(cls, [], {})
    assert s.load(cls, [], s.to_environ(loaded)) == loaded


@pytest.mark.parametrize("cls", s.ALL_SETTINGS)
def test_every_setting_says_who_changes_it(cls: type) -> None:
    for item in s.declared(cls):
        assert item.metadata["help"].endswith("."), item.variable


def test_services_that_share_a_setting_mean_the_same_by_it() -> None:
    meant: dict[str, object] = {}
    # The commands give some of the names a default of their own.
    for cls in set(s.ALL_SETTINGS) - set(COMMANDS):
        for item in s.declared(cls):
            kind = (item.type, item.default, item.metadata["ge"], item.metadata["le"], item.metadata["choices"])
            assert meant.setdefault(item.variable, kind) == kind, item.variable
