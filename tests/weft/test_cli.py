from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft import chat, cli, data_folder, model_folder, operate, status_view, up
from weft.child import Child, ChildSpec
from weft.data_folder import RunFile
from weft.errors import SettingsError
from weft.messages import WorkerStatus
from weft.roster import Member
from weft.settings import ChatSettings, UpSettings, load

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "vocab_size": 64}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own data folder or reads the user's own settings."""
    for name in [name for name in os.environ if name.startswith("WEFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def make_model(folder: Path, config: object = CONFIG, *, weights: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights:
        (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command leaves on standard error."""
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.strip()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (help, _) in cli.COMMANDS.items():
        assert f"weft {name}" in out and help in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: weft {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from weft import cli; cli.run([]); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"nats", "msgspec", "aiohttp", "rich", "torch", "asyncio"} & set(out.split())


def test_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["upp"], capsys) == "weft: no command 'upp'; did you mean `weft up`?"
    assert sentence(["serve"], capsys) == "weft: no command 'serve'; see `weft --help`"


def test_unknown_flag_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["up", "--wrokers", "2"], capsys).startswith("weft up: unrecognized arguments: --wrokers 2")


def test_unknown_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_WORKRES", "2")
    assert sentence(["up"], capsys) == "weft up: WEFT_WORKRES: no such setting; did you mean WEFT_WORKERS?"


def test_bad_setting_of_a_service_is_refused_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["up", "--kv-memory", "lots"], capsys) == (
        "weft up: --kv-memory: 'lots' is no size such as 256MiB or 2GiB"
    )


def test_missing_model_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model './nowhere': it is neither a folder" in sentence(["up", "--model", "./nowhere"], capsys)


def test_folder_that_is_no_model_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no config.json" in sentence(["up", "--model", str(home)], capsys)


def test_model_without_weights_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(home / "m", weights=False)
    assert sentence(["up", "--model", str(folder)], capsys) == (
        f"weft up: {folder} has no weights: no *.safetensors file in it"
    )


@pytest.mark.parametrize("config", ["{", "[]", {**CONFIG, "vocab_size": "many"}, {"vocab_size": 3}])
def test_broken_config_is_named(home: Path, config: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.json" in sentence(["up", "--model", str(make_model(home / "m", config))], capsys)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_taken_port_is_named(taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["up", "--port", str(taken_port)], capsys) == (
        f"weft up: port {taken_port} on 127.0.0.1 is in use: give another one with --port or --host"
    )


def test_foreign_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "on 203.0.113.1 cannot be used" in sentence(["up", "--host", "203.0.113.1"], capsys)


def test_data_folder_that_cannot_be_made_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").write_text("")
    assert f"the data folder {home}/file cannot be used" in sentence(["up", "--data-path", f"{home}/file"], capsys)


def test_data_folder_in_use_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, lock = data_folder.take("")
    folder.write_run_file(RunFile(os.getpid(), "http://localhost:8000", "nats://x", "supervisor", "secret"))
    told = sentence(["up"], capsys)
    os.close(lock)
    assert f"another `weft up` runs in {home}/.cache/weft (process {os.getpid()}, http://localhost:8000)" in told


def test_instance_is_no_choice_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`weft up` names its processes itself" in sentence(["up", "--instance", "x"], capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prewarm", "1"], "--prewarm: it is for --scale, which is none; --workers says how many there are"),
        (["--min-workers", "2"], "--min-workers: it is for --scale, which is none; --workers says how many there are"),
        (
            ["--scale", "queue", "--workers", "2"],
            "--workers: 2 are more than --scale may start: --max-workers says how many",
        ),
    ],
)
def test_numbers_of_workers_that_mean_nothing_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence(["up", *flags], capsys) == f"weft up: {said}"


def test_sockets_are_no_choice_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`weft up` opens its sockets itself" in sentence(["up", "--listen-fds", "3"], capsys)


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--tensor-parallel", "2"]], ids=" ".join)
def test_workers_are_forked_on_one_cpu_only(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["up", "--fork", *flags], capsys) == (
        "weft up: --fork: only workers on one CPU share their weights; give --device cpu, or no --fork"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["top"],
        ["drain", "worker-0"],
        ["drain", "--nats-user", "x", "worker-0"],
        ["policy"],
        ["policy", "order=srpt", "--model", "x", "route=random"],
    ],
    ids=" ".join,
)
def test_operators_are_told_that_nothing_runs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no `weft up` runs in" in sentence(argv, capsys)


@pytest.mark.parametrize("argv", [[], ["worker-0", "worker-1"], ["--nats-user", "x"]], ids=" ".join)
def test_drain_asks_which_instance(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "which instance?" in sentence(["drain", *argv], capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["order"], "'order' is not FAMILY=NAME, as in order=srpt"),
        (["order="], "'order=' is not FAMILY=NAME, as in order=srpt"),
        (["order=srpt", "order=fcfs"], "order is given twice"),
    ],
)
def test_policy_says_what_is_no_change(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(["policy", *words], capsys) == f"weft policy: {expected}"


def test_chat_says_that_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as silent:
        # Bound only: others do not get its port, and connections are refused.
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert cli.run(["chat", "--url", url]) == 1
    assert f"nothing listens at {url}" in capsys.readouterr().err


def test_private_files_are_private(home: Path) -> None:
    folder, lock = data_folder.take(str(home / "data"))
    folder.write_run_file(RunFile(os.getpid(), "u", "n", "supervisor", "secret"))
    os.close(lock)
    modes = [
        folder.run_file.stat().st_mode & 0o777,
        folder.run.stat().st_mode & 0o777,
        folder.kv.stat().st_mode & 0o777,
    ]
    assert modes == [0o600, 0o700, 0o700]


def test_run_file_of_a_dead_process_counts_for_nothing(home: Path) -> None:
    folder, lock = data_folder.take(str(home / "data"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder.write_run_file(RunFile(gone.pid, "u", "n", "supervisor", "secret"))
    os.close(lock)
    assert data_folder.read_run_file(folder) is None


def plan(argv: list[str], environ: dict[str, str], home: Path) -> up.Plan:
    settings = load(UpSettings, ["--model", str(make_model(home / "my-model")), *argv], environ)
    model = model_folder.read(settings.worker.model)
    return up.make_plan(settings, model, data_folder.at(str(home / "data")), environ)


def test_plan_gives_every_role_its_own_password_and_no_other(home: Path) -> None:
    specs = plan(["--workers", "2"], {}, home).specs
    assert [spec.name for spec in specs] == [
        "gateway-0", "tokenizer-0", "scheduler-0", "cache-0", "worker-0", "worker-1",
    ]  # fmt: skip
    passwords = {spec.environ["WEFT_NATS_PASSWORD"] for spec in specs}
    assert len(passwords) == 5
    assert not any(password in " ".join(spec.argv) for spec in specs for password in passwords)


def test_plan_sets_up_a_workers_libraries_unless_the_user_did(home: Path) -> None:
    by_role = {spec.role: spec.environ for spec in plan([], {"GOMP_SPINCOUNT": "7"}, home).specs}
    assert by_role["worker"]["GOMP_SPINCOUNT"] == "7"
    assert "hugetlb=1" in by_role["worker"]["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in by_role["gateway"]


def test_plan_hands_flags_and_variables_to_the_services_that_have_them(home: Path) -> None:
    made = plan(["--kv-memory", "1MiB", "--port", "123"], {"WEFT_ROUTE": "round_robin", "PATH": "/bin"}, home)
    by_role = {spec.role: spec.environ for spec in made.specs}
    assert by_role["worker"]["WEFT_KV_MEMORY"] == "1048576"
    assert by_role["scheduler"]["WEFT_ROUTE"] == "round_robin"
    assert by_role["gateway"]["WEFT_PORT"] == "123" and made.url == "http://localhost:123"
    assert by_role["tokenizer"]["WEFT_MODEL"] == by_role["worker"]["WEFT_MODEL"] == str(home / "my-model")
    assert by_role["worker"]["WEFT_SERVED_NAME"] == made.model == "my-model"
    assert by_role["cache"]["WEFT_DISK_PATH"] == str(home / "data/kv")
    assert by_role["gateway"]["PATH"] == "/bin" and "WEFT_ROUTE" not in by_role["gateway"]


def test_plan_deals_gpus_and_ports_out(home: Path) -> None:
    specs = plan(["--workers", "3", "--metrics-port", "9100"], {"CUDA_VISIBLE_DEVICES": "4,7"}, home).specs
    assert [spec.environ["CUDA_VISIBLE_DEVICES"] for spec in specs if spec.role == "worker"] == ["4", "7", "4"]
    assert [spec.environ["WEFT_METRICS_PORT"] for spec in specs] == [str(port) for port in range(9100, 9107)]
    assert len({spec.environ["WEFT_THREADS"] for spec in specs if spec.role == "worker"}) == 1


@pytest.mark.parametrize(
    ("gpus", "ranks", "dealt"),
    [("4,7,2,5", 2, ["4,7", "2,5"]), ("4,7,2", 2, ["4,7", "2,4"]), ("4,7", 3, ["4,7", "7,4"])],
)
def test_plan_deals_every_worker_a_gpu_for_each_rank(home: Path, gpus: str, ranks: int, dealt: list[str]) -> None:
    argv = ["--workers", "2", "--tensor-parallel", str(ranks)]
    specs = plan(argv, {"CUDA_VISIBLE_DEVICES": gpus}, home).specs
    assert [spec.environ["CUDA_VISIBLE_DEVICES"] for spec in specs if spec.role == "worker"] == dealt


def test_plan_on_a_shared_bus_starts_no_server_and_names_the_host(home: Path) -> None:
    made = plan(["--nats-url", "nats://elsewhere:4222"], {}, home)
    assert made.passwords == {}
    assert all(spec.name.startswith(f"{spec.role}-0-") for spec in made.specs)
    assert {spec.environ["WEFT_NATS_URL"] for spec in made.specs} == {"nats://elsewhere:4222"}


def test_two_meshes_of_one_host_share_a_bus_without_sharing_names(home: Path) -> None:
    def names(root: Path) -> set[str]:
        root.mkdir()
        return {spec.name for spec in plan(["--nats-url", "nats://elsewhere:4222"], {}, root).specs}

    assert not names(home / "one") & names(home / "two")


def child(name: str, role: str, state: str, **facts: object) -> Child:
    made = Child(ChildSpec(name, role, (), {}), state)  # type: ignore[arg-type]  # literals
    for fact, value in facts.items():
        setattr(made, fact, value)
    return made


def test_status_lines_tell_starting_from_loading_from_ready() -> None:
    children = [
        child("nats", None, "ready", since=1.0, ready_at=1.1),
        child("gateway-0", "gateway", "starting", since=1.0),
        child("worker-0", "worker", "starting", since=1.0, epoch=1),
        child("cache-0", "cache", "waiting"),
        child("worker-1", "worker", "starting", since=1.0, epoch=1, loaded=0.5),
    ]
    lines = status_view.status_lines(children, now=3.5)
    assert "✓ nats           ready       0.1 s" in lines[0]
    assert "gateway-0      starting    2.5 s" in lines[1]
    assert "worker-0       loading     2.5 s" in lines[2]
    assert "cache-0        died" in lines[4]
    assert lines[3].endswith("loading     2.5 s  ██████████░░░░░░░░░░  50%")


def test_many_workers_share_a_line() -> None:
    children = [child(f"worker-{i}", "worker", "ready" if i < 5 else "starting") for i in range(20)]
    (line,) = status_view.status_lines(children, now=0.0)
    assert line.endswith("workers        5 of 20 ready")


def test_top_shows_load_of_this_life_only() -> None:
    status = WorkerStatus(
        "worker-0", 5_000_000, "m", "ready", 8, 3, 2, 0, 100, 60, {}, 0, 900.0, 30.0
    )  # fmt: skip
    members = [
        Member("worker", "worker-0", 5_000_000, "ready", ("m",), 0.0),
        Member("worker", "worker-1", 5_000_000, "draining", (), 0.0),
    ]
    text = operate.table(members, {"worker-0": status, "worker-1": WorkerStatus(
        "worker-1", 1, "m", "ready", 8, 3, 2, 0, 100, 60, {}, 0
    )}, now=65.0)  # fmt: skip
    head, first, second = [line.split() for line in text.splitlines()]
    assert head[0] == "INSTANCE"
    assert first == ["worker-0", "ready", "60s", "3", "2", "60/100", "900", "30", "m"]
    assert second == ["worker-1", "draining", "60s", "-", "-", "-", "-", "-", "-"]


def test_chat_takes_the_model_that_is_served() -> None:

    assert chat._choose("", ["a", "b"]) == "a"
    assert chat._choose("/models/b", ["a", "b"]) == "b"
    with pytest.raises(SettingsError, match="no model 'c' is served; there is a, b"):
        chat._choose("c", ["a", "b"])


def test_chat_sends_only_what_was_asked_for() -> None:

    assert chat._body(load(ChatSettings, [], {}), "m", []) == {"model": "m", "messages": []}
    asked = load(ChatSettings, ["--temperature", "0", "--max-tokens", "5"], {})
    assert chat._body(asked, "m", []) == {"model": "m", "messages": [], "temperature": 0.0, "max_tokens": 5}
