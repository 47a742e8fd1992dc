"""Plain torch in f64, one file an op: what the kernels compute, with no tricks. Every implementation is held to it."""
