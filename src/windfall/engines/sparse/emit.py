"""A small notation for loops over vectors.

A kernel is a Python function of an `Emitter`, static values and arguments; running it writes its
code. Values and pointers overload Python's operators, so that a kernel reads as what it does:

    def scale(k, static, x, factor, count):
        with k.range(0, count, LANES) as i:
            x.put(i, factor * x.vector(i))

`Emitter.call` makes a function of a kernel once for each set of static values, and calls it. A
vector has LANES lanes whatever the processor: LLVM cuts it to the registers there are.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

LANES = 16
I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
REALS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
ADDRESS = ir.PointerType()

Kernel = Callable[..., None]


def _is_real(kind: ir.Type) -> bool:
    scalar = kind.element if isinstance(kind, ir.VectorType) else kind
    return isinstance(scalar, ir.FloatType | ir.DoubleType)


def vector_of(kind: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(kind, lanes)


class Value:
    """A number or vector in the code; a scalar meets a vector in every lane."""

    def __init__(self, emitter: "Emitter", value: Any) -> None:
        self.emitter, self.ir = emitter, value

    def _with(self, other: Any, whole: str, real: str, *, swap: bool = False) -> "Value":
        one, two = self.emitter.matched(self, other)
        if swap:
            one, two = two, one
        operation = real if _is_real(one.ir.type) else whole
        return Value(self.emitter, getattr(self.emitter.builder, operation)(one.ir, two.ir))

    def _compared(self, relation: str, other: Any) -> "Value":
        one, two = self.emitter.matched(self, other)
        builder = self.emitter.builder
        compare = builder.fcmp_ordered if _is_real(one.ir.type) else builder.icmp_signed
        return Value(self.emitter, compare(relation, one.ir, two.ir))

    def __add__(self, other: Any) -> "Value":
        return self._with(other, "add", "fadd")

    def __radd__(self, other: Any) -> "Value":
        return self._with(other, "add", "fadd")

    def __sub__(self, other: Any) -> "Value":
        return self._with(other, "sub", "fsub")

    def __rsub__(self, other: Any) -> "Value":
        return self._with(other, "sub", "fsub", swap=True)

    def __mul__(self, other: Any) -> "Value":
        return self._with(other, "mul", "fmul")

    def __rmul__(self, other: Any) -> "Value":
        return self._with(other, "mul", "fmul")

    def __truediv__(self, other: Any) -> "Value":
        return self._with(other, "sdiv", "fdiv")

    def __rtruediv__(self, other: Any) -> "Value":
        return self._with(other, "sdiv", "fdiv", swap=True)

    def __and__(self, other: Any) -> "Value":
        return self._with(other, "and_", "and_")

    def __lt__(self, other: Any) -> "Value":
        return self._compared("<", other)

    def __le__(self, other: Any) -> "Value":
        return self._compared("<=", other)

    def __gt__(self, other: Any) -> "Value":
        return self._compared(">", other)

    def equals(self, other: Any) -> "Value":
        """Whether they are equal."""
        return self._compared("==", other)

    def lanes(self, *indices: int) -> "Value":
        """These lanes of the vector."""
        return self.emitter.shuffle(self, self, indices)


class Pointer:
    """The address of elements of one type."""

    def __init__(self, emitter: "Emitter", address: Any, kind: ir.Type) -> None:
        self.emitter, self.ir, self.kind = emitter, address, kind

    def __add__(self, index: Any) -> "Pointer":
        return Pointer(self.emitter, self._at(index), self.kind)

    def _at(self, index: Any) -> Any:
        if isinstance(index, int) and index == 0:
            return self.ir
        offset = self.emitter.index(index).ir
        return self.emitter.builder.gep(self.ir, [offset], source_etype=self.kind)

    def _load(self, index: Any, kind: ir.Type) -> Value:
        size = self.kind.width // 8 if isinstance(self.kind, ir.IntType) else None
        align = size or (4 if isinstance(self.kind, ir.FloatType) else 8)
        loaded = self.emitter.builder.load(self._at(index), typ=kind, align=align)
        return Value(self.emitter, loaded)

    def __getitem__(self, index: Any) -> Value:
        """The element; integers come as 64 bits, bytes unsigned."""
        value, builder = self._load(index, self.kind), self.emitter.builder
        if isinstance(self.kind, ir.IntType) and self.kind.width < 64:
            widen = builder.zext if self.kind == I8 else builder.sext
            return Value(self.emitter, widen(value.ir, I64))
        return value

    def vector(self, index: Any, lanes: int = LANES) -> Value:
        """LANES elements from an index on; it need not be aligned."""
        return self._load(index, vector_of(self.kind, lanes))

    def address(self, index: Any) -> Any:
        """The address kept there, to make a pointer of."""
        return self._load(index, ADDRESS).ir

    def put(self, index: Any, value: Any) -> None:
        """Store an element, or a vector from an index on."""
        value = self.emitter.value(value, self.kind)
        if isinstance(self.kind, ir.IntType) and value.ir.type == I64 and self.kind.width < 64:
            value = Value(self.emitter, self.emitter.builder.trunc(value.ir, self.kind))
        align = (
            4
            if isinstance(self.kind, ir.FloatType)
            else max(1, getattr(self.kind, "width", 64) // 8)
        )
        self.emitter.builder.store(value.ir, self._at(index), align=align)


class Variable:
    """A place for a value that changes in a loop; a register once compiled."""

    def __init__(self, emitter: "Emitter", start: Value) -> None:
        self.emitter, self.kind = emitter, start.ir.type
        with emitter.builder.goto_entry_block():
            self.place = emitter.builder.alloca(self.kind)
        self.set(start)

    def get(self) -> Value:
        """Its value now."""
        return Value(self.emitter, self.emitter.builder.load(self.place, typ=self.kind))

    def set(self, value: Value) -> None:
        """Give it another value."""
        self.emitter.builder.store(value.ir, self.place)


class Emitter:
    """Writes the code of one function.

    Args:
        module: that the function is in.
        function: to be written.
        dtype: of the real numbers, `float32` or `float64`.
        made: the functions of the module so far, by what made them.
    """

    def __init__(
        self, module: ir.Module, function: ir.Function, dtype: str, made: dict[Hashable, Any]
    ) -> None:
        self.module, self.dtype, self.real, self.made = module, dtype, REALS[dtype], made
        self.function = function
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))

    # -- values

    def value(self, value: Any, kind: ir.Type) -> Value:
        """A Python number as a scalar of a type; other values as they are."""
        if isinstance(value, Value):
            return value
        return Value(self, ir.Constant(kind, float(value) if _is_real(kind) else int(value)))

    def index(self, value: Any) -> Value:
        """A Python integer as 64 bits; other values as they are."""
        return self.value(value, I64)

    def matched(self, one: Any, two: Any) -> tuple[Value, Value]:
        """Two values of one type: a number takes the other's, a scalar is spread over lanes."""
        first = one if isinstance(one, Value) else two
        kind = first.ir.type
        scalar = kind.element if isinstance(kind, ir.VectorType) else kind
        one, two = self.value(one, scalar), self.value(two, scalar)
        wide = [v.ir.type.count for v in (one, two) if isinstance(v.ir.type, ir.VectorType)]
        if wide:
            one, two = self.spread(one, wide[0]), self.spread(two, wide[0])
        return one, two

    def spread(self, value: Any, lanes: int = LANES) -> Value:
        """A scalar in every lane."""
        value = self.value(value, self.real)
        if isinstance(value.ir.type, ir.VectorType):
            return value
        one = ir.Constant(vector_of(value.ir.type, lanes), ir.Undefined)
        put = self.builder.insert_element(one, value.ir, ir.Constant(I32, 0))
        zeros = ir.Constant(vector_of(I32, lanes), [0] * lanes)
        return Value(self, self.builder.shuffle_vector(put, one, zeros))

    def zeros(self, lanes: int = LANES) -> Value:
        """A real vector of zeros."""
        return self.constants([0.0] * lanes)

    def constants(self, numbers: Sequence[float], kind: ir.Type | None = None) -> Value:
        """A vector of these numbers; by default real."""
        return Value(self, ir.Constant(vector_of(kind or self.real, len(numbers)), list(numbers)))

    def cast(self, value: Value, kind: ir.Type) -> Value:
        """A value as another scalar type, in every lane: integers (unsigned) to reals and so on."""
        here = value.ir.type
        scalar = here.element if isinstance(here, ir.VectorType) else here
        target = vector_of(kind, here.count) if isinstance(here, ir.VectorType) else kind
        if scalar == kind:
            return value
        if isinstance(scalar, ir.IntType) and isinstance(kind, ir.IntType):
            name = "zext" if kind.width > scalar.width else "trunc"
        elif isinstance(scalar, ir.IntType):
            name = "uitofp"
        elif isinstance(kind, ir.IntType):
            name = "fptosi"
        else:
            name = "fpext" if isinstance(kind, ir.DoubleType) else "fptrunc"
        return Value(self, getattr(self.builder, name)(value.ir, target))

    def bits(self, value: Value, kind: ir.Type) -> Value:
        """The same bits as a vector of another scalar type."""
        return Value(self, self.builder.bitcast(value.ir, vector_of(kind, value.ir.type.count)))

    def fma(self, one: Value, two: Value, three: Value) -> Value:
        """one two + three, rounded once where the processor can."""
        one, two = self.matched(one, two)
        kind = one.ir.type
        return self._intrinsic("llvm.fmuladd", kind, [one, two, three])

    def sqrt(self, value: Value) -> Value:
        """The square root."""
        return self._intrinsic("llvm.sqrt", value.ir.type, [value])

    def log(self, value: Value) -> Value:
        """The natural logarithm."""
        return self._intrinsic("llvm.log", value.ir.type, [value])

    def floor(self, value: Value) -> Value:
        """The largest integer not above, as a real."""
        return self._intrinsic("llvm.floor", value.ir.type, [value])

    def _intrinsic(self, name: str, kind: ir.Type, arguments: list[Value]) -> Value:
        suffix = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        full = f"{name}.{suffix}f{32 if self.dtype == 'float32' else 64}"
        if full not in self.module.globals:
            ir.Function(self.module, ir.FunctionType(kind, [kind] * len(arguments)), full)
        function = self.module.globals[full]
        return Value(self, self.builder.call(function, [value.ir for value in arguments]))

    def select(self, condition: Value, yes: Any, no: Any) -> Value:
        """`yes` where the condition holds, else `no`."""
        yes, no = self.matched(yes, no)
        kind = condition.ir.type
        if isinstance(kind, ir.VectorType):
            yes, no = self.spread(yes, kind.count), self.spread(no, kind.count)
        return Value(self, self.builder.select(condition.ir, yes.ir, no.ir))

    def shuffle(self, one: Value, two: Value, lanes: Sequence[int]) -> Value:
        """The lanes named, of the two vectors one after the other."""
        chosen = ir.Constant(vector_of(I32, len(lanes)), list(lanes))
        return Value(self, self.builder.shuffle_vector(one.ir, two.ir, chosen))

    def lane(self, value: Value, index: int) -> Value:
        """One lane of a vector."""
        return Value(self, self.builder.extract_element(value.ir, ir.Constant(I32, index)))

    def variable(self, start: Value) -> Variable:
        """A variable of this value."""
        return Variable(self, start)

    # -- control

    @contextmanager
    def range(self, start: Any, stop: Any, step: Any = 1) -> Generator[Value]:
        """The body is run for start, start + step, ... below stop."""
        counter, end = self.variable(self.index(start)), self.index(stop)
        head, body, after = (self.builder.append_basic_block(n) for n in ("head", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        here = counter.get()
        self.builder.cbranch((here < end).ir, body, after)
        self.builder.position_at_end(body)
        yield here
        counter.set(here + step)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Generator[None]:
        """The body is run if the condition holds."""
        with self.builder.if_then(condition.ir):
            yield

    def call(self, kernel: Kernel, static: Hashable, *arguments: Value | Pointer) -> None:
        """Run a kernel's code here: a call of its function, made at the first use."""
        kinds = tuple(a.kind if isinstance(a, Pointer) else a.ir.type for a in arguments)
        key = (
            kernel,
            static,
            tuple(map(str, kinds)),
            tuple(isinstance(a, Pointer) for a in arguments),
        )
        if key not in self.made:
            takes = [ADDRESS if isinstance(a, Pointer) else a.ir.type for a in arguments]
            kind = ir.FunctionType(ir.VoidType(), takes)
            name = f"{kernel.__name__}.{len(self.made)}"
            function = ir.Function(self.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            self.made[key] = function
            inner = Emitter(self.module, function, self.dtype, self.made)
            given = [
                Pointer(inner, value, kind) if isinstance(a, Pointer) else Value(inner, value)
                for a, kind, value in zip(arguments, kinds, function.args, strict=True)
            ]
            kernel(inner, static, *given)
            inner.builder.ret_void()
        self.builder.call(self.made[key], [a.ir for a in arguments])
