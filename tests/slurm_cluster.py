"""A cluster on this machine: Debian's munged, slurmctld and slurmd, two nodes by default; it exists while the program that asked for it lives

    python tests/slurm_cluster.py sinfo             # a command in it
    with slurm_cluster() as cluster: ...            # in a program

All of it lies in a temporary folder, but for /etc/slurm/slurm.conf, where the programs of SLURM look: a file that is there already means a real cluster, and is left
alone. Nothing but 127.0.0.1 is used. A process of its own ends the daemons and what runs in jobs, also when this program was killed."""
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from waiting import wait_until

CONF = Path('/etc/slurm/slurm.conf')
MARK = '# a cluster for tests, until process '
PROGRAMS = ('munged','slurmctld','slurmd','sbatch','squeue','srun','scontrol')
SETTINGS = """{mark}{pid} ends: {folder}
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=8
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
DefMemPerCPU=500
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName=n[1-{n}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}] CPUs={cpus} CoresPerSocket={cpus} RealMemory=8000
PartitionName=main Nodes=n[1-{n}] Default=YES State=UP
"""


def missing_reason():
    "Why there can be no cluster here; '' where there can"
    if lacking := [name for name in PROGRAMS if not shutil.which(name)]:
        return f'no SLURM: {", ".join(lacking)} not installed (Debian: apt-get install slurmctld slurmd slurm-client munge)'
    if os.geteuid(): return 'a cluster of SLURM for tests must be started by root'
    if CONF.exists() and not (first := CONF.read_text().split('\n')[0]).startswith(MARK): return f'{CONF} is there: a real cluster is left alone'
    if CONF.exists() and psutil.pid_exists(pid := int(first.removeprefix(MARK).split()[0])): return f'process {pid} has a cluster of SLURM for tests'
    return ''


def free_ports(n):
    "`n` ports in a row that nobody listens to"
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            first = 20000+secrets.randbelow(10000)
            try:
                for port in range(first, first+n): stack.enter_context(socket.socket()).bind(('127.0.0.1', port))
            except OSError: continue
            return range(first, first+n)
    raise OSError('no free ports')


def processes_of(folder, name, node=''):
    "Running daemons of a cluster and what runs in its jobs; those of one node"
    log = f'{folder}/slurmd-{node}.log' if node else folder # what slurmd and slurmstepd write to: slurmstepd has no environment to be read
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE: continue
            env = process.environ()
            in_job = env.get('SLURM_CLUSTER_NAME') == name and node in ('', env.get('SLURMD_NODENAME'))
            if in_job or not node and env.get('SLURM_TEST_CLUSTER') == name: yield process
            elif process.name().startswith('slurm') and any(file.path.startswith(log) for file in process.open_files()): yield process


def kill_all(*which):
    "Kill `processes_of(*which)`"
    def kill():
        for process in (left := list(processes_of(*which))):
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()
        return not left
    wait_until(kill, 'need the end of all processes') # again: some were started while the first were ended


class Cluster:
    "The daemons, and what may happen to them"
    def __init__(self, folder, name, n): self.folder,self.name,self.nodes = Path(folder),name,[f'n{i+1}' for i in range(n)]

    def run(self, *command, check=True, **kwargs):
        "What a command prints"
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)
        if check and done.returncode: raise RuntimeError(f'{" ".join(map(str, command))}: {done.stdout}{done.stderr}')
        return done.stdout.strip()

    def _stop(self, file):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ValueError):
            process = psutil.Process(int((self.folder/file).read_text()))
            process.terminate()
            process.wait(30)

    def start_munge(self):
        "What lets the daemons trust one another; a key of its own"
        key = self.folder/'munge.key'
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self.run('munged', f'--socket={self.folder}/munge.socket', f'--key-file={key}', f'--log-file={self.folder}/munged.log',
                     f'--pid-file={self.folder}/munged.pid', f'--seed-file={self.folder}/munged.seed')

    def start_controller(self):
        self.run('slurmctld')
        wait_until(lambda: 'is UP' in self.run('scontrol', 'ping', check=False), 'need slurmctld to answer')

    def stop_controller(self): self._stop('slurmctld.pid')
    def start_node(self, node): self.run('slurmd', '-N', node)
    def stop_node(self, node): self._stop(f'slurmd-{node}.pid')

    def cut_power(self, node):
        "A node that is gone with all that ran there; the controller is told, as it would notice after a while"
        kill_all(self.folder.as_posix(), self.name, node)
        self.run('scontrol', 'update', f'nodename={node}', 'state=down', 'reason=power')

    def restore_power(self, node):
        "The node is there again"
        self.start_node(node)
        wait_until(lambda: self.run('sinfo', '--noheader', f'--nodes={node}', '--format=%T') in ('idle','mixed','allocated'), f'need {node} to register')

    def wait_for_nodes(self): wait_until(lambda: self.run('sinfo', '--noheader', '--format=%D %T', check=False) == f'{len(self.nodes)} idle', 'need idle nodes')
    def queue(self): return self.run('squeue', '--all', '--states=all', '--array', '--noheader', '--sort=i', '--format=%i %j %T %M %N %r')


def end_all(folder, name):
    "End the daemons and jobs of a cluster and remove what it has written"
    kill_all(folder, name)
    if CONF.exists() and folder in CONF.read_text().split('\n')[0]: CONF.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def guard(folder, name):
    "Wait until the program that has started this one is gone, then end its cluster"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(folder, name)


@contextlib.contextmanager
def slurm_cluster(n=2, cpus=2):
    "A cluster of `n` nodes; a `RuntimeError` says why there can be none"
    if reason := missing_reason(): raise RuntimeError(reason)
    if CONF.exists(): # of a program that was killed together with its guard
        lines = dict(line.split('=', 1) for line in CONF.read_text().split('\n') if '=' in line)
        end_all(Path(lines['StateSaveLocation']).parent.as_posix(), lines['ClusterName'])
    folder,name = tempfile.mkdtemp(prefix='slurm-'),f'test{secrets.token_hex(4)}'
    os.chmod(folder, 0o755)
    watch = subprocess.Popen([sys.executable, __file__, '--guard', folder, name], stdin=subprocess.PIPE, start_new_session=True)
    os.environ['SLURM_TEST_CLUSTER'] = name # of all that is started from here
    try:
        CONF.parent.mkdir(exist_ok=True)
        ports = free_ports(n+1)
        text = SETTINGS.format(mark=MARK, pid=os.getpid(), folder=folder, name=name, host=socket.gethostname().split('.')[0],
                               ports=(ports[0], f'{ports[1]}-{ports[n]}'), n=n, cpus=cpus)
        with open(CONF, 'x') as file: file.write(text)
        cluster = Cluster(folder, name, n)
        (cluster.folder/'state').mkdir()
        cluster.start_munge()
        cluster.start_controller()
        for node in cluster.nodes: cluster.start_node(node)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        del os.environ['SLURM_TEST_CLUSTER']
        watch.stdin.close()
        watch.wait(90)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--guard']: guard(*sys.argv[2:])
    else:
        with slurm_cluster() as its: sys.exit(subprocess.run(sys.argv[1:] or ['sinfo']).returncode)
