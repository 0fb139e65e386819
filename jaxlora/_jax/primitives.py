"""Names of JAX's primitives, by what they do with an array: the one list that rules, probe and recipes share.

A new primitive of a family is added here, and nowhere else. Control flow has a list of its own, in `control_flow.py`.
"""

# Identities on one value: what they say of it holds of its parts.
VARYING = ("pvary",)
IDENTITIES = ("copy", "copy_p", "name", "stop_gradient", *VARYING)
# Where a value lies on its devices; where it lies on a mesh, by its type.
PLACEMENTS = ("sharding_constraint", "layout_constraint", "relayout")
RESHARDS = ("mesh_cast", "reshard")
TRANSFERS = ("device_put",)
# Inside of `shard_map`: shards put together, and values that go from device to device.
GATHERS_OF_SHARDS = ("all_gather", "all_gather_invariant")
PERMUTATIONS = ("ppermute",)
BARRIERS = ("optimization_barrier",)
CASTS = ("convert_element_type",)
ROUNDINGS = ("reduce_precision",)
NEGATIONS = ("neg",)
REVERSALS = ("rev",)
# Linear in one operand where the other is a scalar.
SCALINGS = ("mul", "div")
# Parts of a value.
SLICES = ("slice", "dynamic_slice", "split")
# Sums, largest and smallest elements along axes.
SUMS_ALONG_AXES = ("reduce_sum", "reduce_max", "reduce_min")
REDUCTIONS = (*SUMS_ALONG_AXES, "reduce_prod", "argmax", "argmin")
# Places along an axis by what is there.
CHOICES = ("argmax", "argmin", "top_k", "approx_top_k", "sort")

# Elementwise operations by what differentiating them keeps. Linear in their one large operand: nothing.
LINEAR = {
  "add", "sub", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "name", "stop_gradient",
  "slice", "select_n", *SCALINGS, *NEGATIONS, *REVERSALS, *CASTS,
}  # fmt: skip
# Their operands.
KEEPS_OPERANDS = {
  "mul", "div", "max", "min", "clamp", "pow", "integer_pow", "square", "abs", "sign", "sin", "cos", "log", "log1p",
  "erf", "select_n", "custom_jvp_call",
}  # fmt: skip
# Their result, which is one array more.
KEEPS_RESULT = {"exp", "exp2", "expm1", "tanh", "logistic", "erf", "erfc", "log1p", "sqrt", "rsqrt", "cbrt"}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite"}
