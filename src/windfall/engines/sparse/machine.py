"""Machine code: what `emit` wrote, compiled by LLVM and kept on disk.

The code of a module is kept in the user's cache folder (or WINDFALL_CACHE) under the SHA-256 of its
text, the processor and the compiler, with the SHA-256 of its own bytes before it. So nothing stale
or damaged is ever run, and the second process need not compile.
"""

import ctypes
import hashlib
import os
import secrets
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import pooch
from llvmlite import ir

from windfall.engines.sparse.emit import ADDRESS, I64, Emitter, Pointer, Value


class Code:
    """A module in the making: entry points, each a function of a table of addresses.

    Args:
        dtype: of the real numbers.
    """

    def __init__(self, dtype: str) -> None:
        self.module, self.dtype = ir.Module("windfall"), dtype
        self.made: dict[Hashable, Any] = {}
        self.entries: list[str] = []

    @contextmanager
    def entry(
        self, name: str, num_arguments: int
    ) -> Generator[tuple[Emitter, Pointer, list[Value]]]:
        """An entry point's emitter, its table of addresses and its integer arguments."""
        kind = ir.FunctionType(ir.VoidType(), [ADDRESS, *[I64] * num_arguments])
        function = ir.Function(self.module, kind, name)
        emitter = Emitter(self.module, function, self.dtype, self.made)
        table = Pointer(emitter, function.args[0], ADDRESS)
        yield emitter, table, [Value(emitter, value) for value in function.args[1:]]
        emitter.builder.ret_void()
        self.entries.append(name)

    def compiled(self, processor: str | None = None) -> "Library":
        """The module's machine code, from disk if it was compiled before."""
        return Library(str(self.module), self.entries, processor)


class Library:
    """Machine code in memory; calling an entry point leaves the interpreter's lock free.

    Args:
        text: LLVM assembly.
        entries: names of the functions to be called.
        processor: to compile for, `name` or `name,+feature,...`; None is this one.
    """

    def __init__(self, text: str, entries: Sequence[str], processor: str | None) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        name, features = _host() if processor is None else _named(processor)
        target = llvm.Target.from_default_triple()
        self._machine = target.create_target_machine(
            cpu=name, features=features, opt=3, reloc="pic", codemodel="small"
        )
        key = [text, name, features, llvmlite.__version__, str(llvm.llvm_version_info)]
        self._jit = llvm.create_lljit_compiler(self._machine, use_jit_link=True)
        code = _kept(
            hashlib.sha256("\0".join(key).encode()).hexdigest(), lambda: self._object(text)
        )
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for entry in entries:
            builder = builder.export_symbol(entry)
        self._tracker = builder.link(self._jit, "windfall")
        self._addresses = {entry: self._tracker[entry] for entry in entries}

    def _object(self, text: str) -> bytes:
        module = llvm.parse_assembly(text)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        passes = llvm.create_pass_builder(self._machine, options)
        passes.getModulePassManager().run(module, passes)
        return self._machine.emit_object(module)

    def function(self, entry: str, num_arguments: int) -> Callable[..., None]:
        """An entry point as a Python function of the table's address and integers."""
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * (1 + num_arguments))
        call: Any = kind(self._addresses[entry])
        call.library = self  # the code lives as long as what calls it
        return call


def _host() -> tuple[str, str]:
    found = llvm.get_host_cpu_features()
    # LLVM would halve 16 lanes where it holds 512 bits to be slow; hand-written vectors are not.
    wide = ",-prefer-256-bit" if found.get("avx512f") else ""
    return llvm.get_host_cpu_name(), found.flatten() + wide


def _named(processor: str) -> tuple[str, str]:
    name, _, features = processor.partition(",")
    return name, features


def _kept(key: str, make: Callable[[], bytes]) -> bytes:
    """The code of this key from the user's cache folder, or made and put there."""
    folder = Path(os.environ.get("WINDFALL_CACHE") or pooch.os_cache("windfall")) / "kernels"
    path = folder / f"{key}.o"
    with suppress(OSError):
        digest, code = (content := path.read_bytes())[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = make()
    with suppress(OSError):  # a folder that cannot be written costs time, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{key}.{secrets.token_hex(4)}.part"
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    return code
