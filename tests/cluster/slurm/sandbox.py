"""A real Slurm cluster of virtual nodes on one machine, without systemd. Needs root.

Each node has its own network, UTS, mount and PID namespace: an address on a private bridge, a hostname, /dev/shm,
/tmp/ray and a process table of its own. Disk, CPUs and memory are the machine's; Slurm is told sizes and enforces none.
`python -m tests.cluster.slurm` starts and stops one by hand.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.slurm.configuration import CGROUP_CONF, CONF, EPILOG
from tests.cluster.slurm.processes import alive, children, identity, stop

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PRIVATE = ("/tmp/ray",)  # directories of which each node has its own
SHM_MIB = 2048


class NotUp(RuntimeError):
    """The cluster, or a part of it, did not come up."""


def why_not() -> str | None:
    """What this machine lacks to run a cluster; None where nothing is missing."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a sandbox of Slurm needs root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", LINK_TRIAL],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"the kernel grants no namespaces with bridge and veth: {tried.stderr.strip()[:200]}"
    return None


LINK_TRIAL = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs tmpfs /dev/shm"


class Sandbox:
    """The cluster in a directory. Its processes are known by pid and start time, so that none is signalled whose
    pid belongs to another by now."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.conf = self.folder / "etc/slurm.conf"
        self.log = self.folder / "log"
        self.leftovers = self.log / "leftovers.log"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "SLURM_SANDBOX_DIR": str(self.folder)}

    @property
    def state(self) -> dict[str, Any] | None:
        path = self.folder / "state.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _save(self, state: dict[str, Any]) -> None:
        new = self.folder / "state.json.new"
        new.write_text(json.dumps(state, indent=1))
        new.rename(self.folder / "state.json")

    def up(
        self,
        nodes: int,
        cpus: int = 4,
        memory: int = 8000,
        gpus: int = 0,
        subnet: str = "10.77.0",
        port: int = 16817,
        requeue_wait: int = 10,
        kill_wait: int = 5,
        node_timeout: int = 10,
    ) -> None:
        """Start a cluster of nodes node1, node2, ... and wait until all are idle.

        Args:
            cpus, memory, gpus: of each node, as declared to Slurm; memory in MB. GPUs are copies of /dev/null.
            subnet: the first three numbers of addresses that nothing else on this machine uses.
            port: of slurmctld; slurmd uses the next one.
            requeue_wait, kill_wait, node_timeout: seconds until a requeued job starts again (at least 5), between TERM
                and KILL, and until a silent node counts as down.

        Raises:
            NotUp: with the end of the log of what did not start.
        """
        if self.state:
            self.down()
        if self.folder.exists() and any(self.folder.iterdir()):
            if not self.conf.exists():
                raise NotUp(f"{self.folder} holds something that is not a sandbox")
            shutil.rmtree(self.folder)
        names = [f"node{number}" for number in range(1, nodes + 1)]
        bridge = "sb" + hashlib.sha1(str(self.folder).encode()).hexdigest()[:6]
        state = {"names": names, "bridge": bridge, "subnet": subnet, "daemons": {}, "nodes": {}}
        for part in ("etc", "log", "run", "spool/ctld", "munge", "dev"):
            (self.folder / part).mkdir(parents=True)
        self._save(state)
        host = socket.gethostname().split(".")[0]
        gres = f" Gres=gpu:{gpus}" if gpus else ""
        self.conf.write_text(
            CONF.format(
                folder=self.folder,
                host=host,
                subnet=subnet,
                port=port,
                slurmd_port=port + 1,
                requeue_wait=requeue_wait,
                kill_wait=kill_wait,
                node_timeout=node_timeout,
                memory_per_cpu=max(1, memory // cpus),
                gres="GresTypes=gpu" if gpus else "",
                nodes="\n".join(
                    f"NodeName={name} NodeHostname={name} NodeAddr={subnet}.{10 + number} CPUs={cpus} "
                    f"RealMemory={memory}{gres} State=UNKNOWN"
                    for number, name in enumerate(names, 1)
                ),
            )
        )
        (self.folder / "etc/cgroup.conf").write_text(CGROUP_CONF)
        if gpus:
            self._make_gpus(nodes, gpus)
        epilog = self.folder / "etc/epilog"
        epilog.write_text(EPILOG.replace("@LOG@", str(self.leftovers)).replace("@CONF@", str(self.conf)))
        epilog.chmod(0o755)
        addresses = [f"{subnet}.1 {socket.gethostname()}"]
        addresses += [f"{subnet}.{10 + number} {name}" for number, name in enumerate(names, 1)]
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", *addresses]
        (self.folder / "etc/hosts").write_text("\n".join(lines) + "\n")
        try:
            self._start_daemons(state)
            for name in names:
                self._start_node(state, name)
            idle = dict.fromkeys(names, "idle")
            self._until("the nodes", lambda: self.node_states() == idle, 120, log=self.log / "slurmctld.log")
        except BaseException:
            self.down(keep=True)
            raise

    def _make_gpus(self, nodes: int, gpus: int) -> None:
        """slurmd wants a character device for each GPU, and takes the index from the name's last digits."""
        for index in range(gpus):
            os.mknod(self.folder / f"dev/gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        files = f"{self.folder}/dev/gpu" + (f"[0-{gpus - 1}]" if gpus > 1 else "0")
        (self.folder / "etc/gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={files}\n")

    def _start_daemons(self, state: dict[str, Any]) -> None:
        munge = self.folder / "munge"
        key = munge / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge}/munge.{suffix}" for option, suffix in files.items()]
        console = self.log / "munged.console"
        munged = self._spawn(["munged", "--foreground", f"--key-file={key}", *options], console)
        self._record(state, "munged", munged)
        self._until("munged", (munge / "munge.sock").exists, 60, munged, console)
        bridge = state["bridge"]
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{state['subnet']}.1/24", "brd", "+", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        slurmctld = self._spawn(["slurmctld", "-D", "-c", "-f", str(self.conf)], self.log / "slurmctld.console")
        self._record(state, "slurmctld", slurmctld)

    def _record(self, state: dict[str, Any], daemon: str, process: "subprocess.Popen[bytes]") -> None:
        state["daemons"][daemon] = identity(process.pid)
        self._save(state)

    def start_node(self, name: str) -> None:
        """Start a node that was killed; Slurm takes some seconds to notice."""
        self._start_node(self._known(name), name)

    def _start_node(self, state: dict[str, Any], name: str) -> None:
        number = state["names"].index(name) + 1
        console = self.log / f"{name}.console"
        wired, unshared = self.folder / f"run/{name}.wired", self.folder / f"run/{name}.unshared"
        wired.unlink(missing_ok=True)
        unshared.unlink(missing_ok=True)
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        outer = self._spawn(
            ["unshare", *namespaces, sys.executable, "-m", "tests.cluster.slurm", "init", name], console
        )
        self._until(f"namespaces of {name}", unshared.exists, 60, outer, console)
        init = children(outer.pid)[0]
        state["nodes"][name] = {"unshare": identity(outer.pid), "init": identity(init)}
        self._save(state)
        link = f"{state['bridge']}v{number}"
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        _run("ip", "link", "set", link, "master", state["bridge"], "up")
        inside = ("nsenter", "-t", str(init), "-n", "ip")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "addr", "add", f"{state['subnet']}.{10 + number}/24", "brd", "+", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        wired.touch()
        self._until(f"slurmd of {name}", lambda: bool(children(init)), 60, outer, console)

    def run_init(self, name: str) -> None:
        """Be process 1 of a node: what it has of its own, then slurmd, then whatever becomes an orphan."""
        socket.sethostname(name)
        _run("mount", "--bind", f"{self.folder}/etc/hosts", "/etc/hosts")
        _run("mount", "-t", "tmpfs", "-o", f"mode=1777,size={SHM_MIB}m", "tmpfs", "/dev/shm")
        for path in PRIVATE:
            own = self.folder / "private" / name / path.strip("/").replace("/", "_")
            own.mkdir(parents=True, exist_ok=True)
            own.chmod(0o1777)
            Path(path).mkdir(parents=True, exist_ok=True)
            _run("mount", "--bind", str(own), path)
        (self.folder / f"run/{name}.unshared").touch()
        while not (self.folder / f"run/{name}.wired").exists():
            time.sleep(0.01)
        (self.folder / f"spool/{name}").mkdir(parents=True, exist_ok=True)
        subprocess.Popen(["slurmd", "-D", "-N", name, "-f", str(self.conf)], start_new_session=True)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the kernel then kills all else in the namespace
        while True:
            try:
                os.wait()
            except ChildProcessError:
                time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """Kill everything on a node at once; its network goes, too."""
        stop(self._known(name)["nodes"][name]["init"], signal.SIGKILL)

    def command_inside(self, name: str, *command: str) -> list[str]:
        """The command that runs another one inside a node."""
        init = self._known(name)["nodes"][name]["init"][0]
        return ["nsenter", "-t", str(init), "-m", "-u", "-n", "-p", "--", *command]

    def _known(self, name: str) -> dict[str, Any]:
        state = self.state
        if not state or name not in state["names"]:
            raise NotUp(f"no node {name} in {self.folder}")
        return state

    def node_states(self) -> dict[str, str]:
        """What Slurm says about each node: idle, mixed, allocated, down*, ..."""
        said = self.client("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout
        return dict(line.split() for line in said.splitlines() if len(line.split()) == 2)

    def client(self, *command: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a client of Slurm, such as sbatch or squeue."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run(command, check=check, **options)

    def down(self, keep: bool = False) -> None:
        """Stop everything that `up` started, and remove the directory unless it is to be kept."""
        state = self.state
        if not state:
            return
        for node in state["nodes"].values():
            stop(node["init"], signal.SIGKILL)
            stop(node["unshare"])
        for daemon in ("slurmctld", "munged"):
            if daemon in state["daemons"]:
                stop(state["daemons"][daemon], grace=8.0)
        links = [f"{state['bridge']}v{number}" for number in range(1, len(state["names"]) + 1)]
        end = time.monotonic() + 3  # they go with their namespaces, a little later
        while time.monotonic() < end and any(Path("/sys/class/net", link).exists() for link in links):
            time.sleep(0.05)
        for link in (*links, state["bridge"]):
            subprocess.run(["ip", "link", "del", link], capture_output=True)
        (self.folder / "state.json").unlink()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def status(self) -> str:
        """One line for each process, and what sinfo says."""
        state = self.state
        if not state:
            return "down"
        processes = state["daemons"] | {name: node["init"] for name, node in state["nodes"].items()}
        lines = [f"{name:<12} pid {who[0]:<8} {'up' if alive(who) else 'DEAD'}" for name, who in processes.items()]
        sinfo = self.client("sinfo", "-N", "-o", "%N %T %c %m %G %E", check=False).stdout
        return "\n".join([*lines, sinfo.strip(), f"export SLURM_CONF={self.conf}"])

    def _spawn(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=self.environment,
                cwd=ROOT,
            )

    def _until(
        self,
        what: str,
        ready: Callable[[], bool],
        seconds: float,
        process: "subprocess.Popen[bytes] | None" = None,
        log: Path | None = None,
    ) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end or (process is not None and process.poll() is not None):
                tail = log.read_text(errors="replace").splitlines()[-20:] if log and log.exists() else []
                raise NotUp("\n".join([f"{what} did not come up", *tail]))
            time.sleep(0.03)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NotUp(f"{' '.join(command)}: {done.stdout.strip()}")
