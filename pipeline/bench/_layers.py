"""Layers of an image without docker: folders that overlayfs puts together, and commands in a root of them.

Each mount belongs to a namespace of its command and ends with it, however that ends. Needs root.
"""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
BASE_ENVIRONMENT = {"PATH": _PATH, "LANG": "C.UTF-8"}  # of python:3.10-slim-bookworm
# What Python's own image has besides Debian's smallest set: its Dockerfile, and what `ldd` finds.
_DEBIAN_PACKAGES = (
    *("ca-certificates", "netbase", "tzdata", "libbz2-1.0", "libcrypt1", "libdb5.3", "libffi8", "libgdbm6", "liblzma5"),
    *("libncursesw6", "libnsl2", "libreadline8", "libsqlite3-0", "libssl3", "libtirpc3", "libuuid1", "zlib1g"),
)
_MIRROR = "http://deb.debian.org/debian"
_BOOT = "#!/bin/sh\necho 'stands for the boot program of apache/beam_python3.10_sdk'\n"
_NOT_OF_PYTHON = shutil.ignore_patterns("__pycache__", "test", "tests", "idle_test", "site-packages", "tkinter")
# As docker passes its proxy variables to every step: how this machine reaches its registries.
_OF_THE_NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "PIP_CERT", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "UV_DEFAULT_INDEX"),
)
_CERTIFICATES = "/etc/ssl/certs"
_RUN = f"""
mount -t overlay overlay -o "$1" "$2"
mount -t proc proc "$2/proc"
mount --rbind /dev "$2/dev"
mount --bind /sys "$2/sys"
mount -o remount,bind,ro "$2/sys"
mount --bind {_CERTIFICATES} "$2{_CERTIFICATES}"
mount -o remount,bind,ro "$2{_CERTIFICATES}"
shift
root=$1 user=$2
shift 2
exec chroot --userspec="$user" "$root" /usr/bin/env --ignore-environment "$@"
"""
_COPY = """
mount -t overlay overlay -o "$1" "$2"
[ -z "$3" ] || mount -t overlay overlay -o "$3" "$4"
if [ -d "$4/$5" ]; then
    mkdir -p "$2/$6"
    cp --archive --no-preserve=ownership "$4/$5/." "$2/$6/"
else
    mkdir -p "$(dirname "$2/$6")"
    cp --no-preserve=ownership "$4/$5" "$2/$6"
fi
"""


@dataclasses.dataclass(frozen=True)
class Image:
    """What a stage begins with, or ends with.

    Attributes:
        layers: folders, the lowest first.
        environment: that a container of it has.
    """

    layers: tuple[Path, ...]
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a step took.

    Attributes:
        layer: what it changed.
        seconds: that it took.
        mib: of its files on the disk.
        left_out: the host without which it was not run; empty if it was.
        said: on its standard output and error.
    """

    layer: Path
    seconds: float
    mib: float
    left_out: str = ""
    said: str = ""


class Builder:
    """Makes layers below a folder."""

    def __init__(self, folder: Path) -> None:
        """See the class; the folder exists."""
        self._folder = folder

    def python_image(self) -> Image:
        """What stands for python:3.10-slim-bookworm: Debian 12 by debootstrap, and this machine's Python in it."""
        debian, python = self._new("debian"), self._new("python")
        packages = ",".join(_DEBIAN_PACKAGES)
        _check(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(debian), _MIRROR])
        for remains in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(debian / remains)
            (debian / remains / "partial").mkdir(parents=True)
        _copy_python(Path(sys.base_prefix), python / "usr" / "local")
        image = Image((debian, python), BASE_ENVIRONMENT)
        done = self.run(image, "ldconfig", BASE_ENVIRONMENT, "0", "/")
        return Image((*image.layers, done.layer), BASE_ENVIRONMENT)

    def beam_image(self, base: Image) -> Image:
        """What stands for Beam's own image: one with a program in the place of its boot program."""
        layer = self._new("beam")
        boot = layer / "opt" / "apache" / "beam" / "boot"
        boot.parent.mkdir(parents=True)
        boot.write_text(_BOOT)
        boot.chmod(0o755)
        return Image((*base.layers, layer), base.environment)

    def run(
        self, image: Image, command: str, environment: Mapping[str, str], user: str, folder: str, *, online: bool = True
    ) -> Done:
        """Runs a command in a layer of its own.

        Args:
            image: in which.
            command: of the shell.
            environment: all that it has.
            user: UID or UID:GID.
            folder: in which it starts.
            online: whether it may reach the network.

        Raises:
            RuntimeError: it failed; with the end of what it said.
        """
        layer = self._new("run")
        if host := _unreachable(command, environment) if online else "":
            return Done(layer, 0.0, 0.0, host)
        network = {name: os.environ[name] for name in _OF_THE_NETWORK if online and name in os.environ}
        given = {"HOME": _home(image, user), **environment, **network}
        variables = [f"{name}={value}" for name, value in given.items()]
        started = time.monotonic()
        said = self._inside(
            _RUN,
            [
                self._mount(image, layer),
                str(self._root),
                user if ":" in user else f"{user}:{user}",
                f"--chdir={folder}",
            ],
            [*variables, "/bin/sh", "-c", command],
            online,
        )
        return Done(layer, time.monotonic() - started, mib(layer), said=said)

    def copy(self, image: Image, source: Image | Path, path: str, target: str) -> Done:
        """Copies a file, or what is in a folder, into a layer of its own; all of it is root's.

        Args:
            image: into which.
            source: from which, or the context.
            path: in the source.
            target: in the image.
        """
        layer = self._new("copy")
        view, at = ("", str(source)) if isinstance(source, Path) else (self._mount(source, None), str(self._source))
        started = time.monotonic()
        self._inside(_COPY, [self._mount(image, layer), str(self._root), view, at, path, target], [], online=False)
        return Done(layer, time.monotonic() - started, mib(layer))

    @staticmethod
    def remove(image: Image, kept: Iterable[Image]) -> None:
        """Removes the layers of one image that others do not have."""
        for layer in set(image.layers) - {layer for other in kept for layer in other.layers}:
            shutil.rmtree(layer)

    @property
    def _root(self) -> Path:
        return self._at("root")

    @property
    def _source(self) -> Path:
        return self._at("source")

    def _at(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path

    def _new(self, kind: str) -> Path:
        """An empty folder, readable for all, since it becomes a root."""
        layer = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self._folder))
        layer.chmod(0o755)
        return layer

    def _mount(self, image: Image, layer: Path | None) -> str:
        """Options of an overlay: of an image alone, or with a layer to be written on top."""
        options = f"lowerdir={':'.join(map(str, reversed(image.layers)))}"
        if layer is None:
            return options
        work = self._at("work")
        shutil.rmtree(work)
        work.mkdir()
        return f"{options},upperdir={layer},workdir={work}"

    @staticmethod
    def _inside(script: str, arguments: Sequence[str], command: Sequence[str], online: bool) -> str:
        apart = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        network = [] if online else ["--net"]
        return _check([*apart, *network, "sh", "-euc", script, "sh", *arguments, *command])


def _check(command: Sequence[str]) -> str:
    """What a command says; RuntimeError if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-1]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def _copy_python(prefix: Path, target: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for part in ("include", "lib"):
        shutil.copytree(prefix / part / version, target / part / version, symlinks=True, ignore=_NOT_OF_PYTHON)
    (target / "lib" / version / "site-packages").mkdir()
    (target / "bin").mkdir()
    for file in [*(prefix / "lib").glob("libpython*.so*"), prefix / "bin" / version]:
        shutil.copy2(file, target / file.relative_to(prefix), follow_symlinks=False)
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(version)


def _unreachable(command: str, environment: Mapping[str, str]) -> str:
    """A host that a command names, in a variable or not, and that has no address here; empty if there is none."""
    used = [command, *(value for name, value in environment.items() if f"${{{name}}}" in command)]
    named = re.findall(r"https?://([\w.-]+)", " ".join(used))
    return next((host for host in named if not _has_address(host)), "")


def _has_address(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _home(image: Image, user: str) -> str:
    for layer in reversed(image.layers):
        if (accounts := layer / "etc" / "passwd").is_file():
            for line in accounts.read_text().splitlines():
                if (fields := line.split(":"))[2] == user.partition(":")[0]:
                    return fields[5]
    return "/"


def mib(layer: Path) -> float:
    """What a folder takes of the disk, in MiB."""
    said = subprocess.run(["du", "--summarize", "--block-size=1K", layer], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[0]) / 1024
