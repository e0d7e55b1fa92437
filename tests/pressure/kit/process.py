"""The program under test, and load in separate processes."""

import asyncio
import ctypes
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import time

PR_SET_PDEATHSIG = 1
START_S = 20

forks = multiprocessing.get_context("fork")


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Program:
    """ifnewer with its own configuration and data, on ports that the system chooses."""

    def __init__(self, folder, registry, upstream="", more="", listen="", environment=None, descriptors_max=0):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        self.data = self.folder / "data"
        self.environment, self.descriptors_max, self.process = environment or {}, descriptors_max, None
        (self.folder / "ifnewer.toml").write_text(
            f"""
data = "{self.data}"
[listen]
registry = ["127.0.0.1:0"]
admin = "127.0.0.1:0"
{listen}
[tls]
folder = "{self.folder / 'certs'}"
[store]
free = "0 B"
[upstream."docker.io"]
url = "{registry.url}"
{upstream}
{more}
"""
        )
        self.start()

    def start(self):
        limits = None
        if self.descriptors_max:
            limits = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (self.descriptors_max, self.descriptors_max))
        self.log = self.folder / "log"
        with self.log.open("ab") as log:
            offset = log.tell()
            self.process = subprocess.Popen(
                [os.environ["IFNEWER"], "serve", "--config", self.folder / "ifnewer.toml"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=limits,
                env={**plain_environment(), **self.environment},
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            said = self.log.read_text(errors="replace")[offset:]
            found = [re.search(words + r" listening on (127\.0\.0\.1:\d+)", said) for words in ("registry", "admin")]
            if all(found):
                self.address, self.admin = (address(match[1]) for match in found)
                return self
            time.sleep(0.02)
        self.stop()
        raise NotStarted(self.log.read_text(errors="replace")[-2000:])

    def stop(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.stop()
        self.start()

    def remove(self):
        self.stop()
        if not os.environ.get("KEEP"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *arguments, timeout=60):
        return subprocess.run(
            [os.environ["IFNEWER"], *arguments, "--admin", "{}:{}".format(*self.admin)],
            capture_output=True, text=True, timeout=timeout, env=plain_environment(), check=False,
        )

    # --- figures from the kernel

    def rss_mib(self):
        return self.status("VmRSS") / 1024

    def rss_peak_mib(self):
        return self.status("VmHWM") / 1024

    def forget_peak(self):
        (pathlib.Path("/proc") / str(self.process.pid) / "clear_refs").write_text("5")

    def threads(self):
        return self.status("Threads")

    def status(self, name):
        text = (pathlib.Path("/proc") / str(self.process.pid) / "status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])


class NotStarted(Exception):
    """The program rejected its configuration, or did not start."""


def plain_environment():
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return {name: value for name, value in os.environ.items() if name.lower() not in proxies}


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


class Background:
    """Runs `function(stopped, *arguments)`, a coroutine function, in a separate process until it returns."""

    def __init__(self, function, *arguments):
        self.stopped = forks.Event()
        self.results, results = forks.Pipe(duplex=False)
        self.ready = forks.Event()
        # Set by a function that listens.
        self.port = forks.Value("i", 0)

        def body():
            die_with_parent()
            try:
                results.send((False, asyncio.run(function(self, *arguments))))
            except BaseException as failure:  # told to the test, which fails with it
                results.send((True, repr(failure)))
            os._exit(0)

        self.process = forks.Process(target=body, daemon=True)
        self.process.start()

    async def until_ready(self, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.ready.is_set() and self.process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def until_stopped(self):
        while not self.stopped.is_set():
            await asyncio.sleep(0.02)

    async def finish(self, seconds=30):
        """Requests its stop and returns its result; None if it does not end."""
        self.stopped.set()
        return await self.result(seconds)

    async def result(self, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.results.poll() and self.process.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        returned = self.results.recv() if self.results.poll() else (False, None)
        self.kill()
        if returned[0]:
            raise RuntimeError(returned[1])
        return returned[1]

    def kill(self):
        self.process.kill()
        self.process.join()
