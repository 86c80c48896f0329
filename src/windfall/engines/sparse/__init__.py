"""The sparse engine: training on a CPU whose cost is proportional to density.

Weights, gradients and the optimizer's state exist for surviving weights alone. A whole step (batch,
forward pass, loss, backward pass, update) is machine code that runs without the interpreter's lock.
In the order of reading:

    layout     where numbers lie: 16 samples innermost
    emit       a notation for loops over vectors
    machine    machine code: compiled by LLVM, kept on disk
    kernels    products, gradients, updates, the loss
    passes     normalization, pooling, sums
    operations a network as a list of operations
    graph      a module read as one
    pack       surviving weights as lists of entries
    program    the step of a network, compiled
    training   the engine
"""

from windfall.engines.sparse.training import train as train
