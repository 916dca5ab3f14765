"""Products and roundings for kernels: exact where the adapter is finer than the activations, true float32 otherwise."""

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bare 16-bit patterns: its tl.dot multiplies the patterns,
# and its conversion from float32 truncates. `dot` and `to_bfloat16` step around both there, to the
# values that a GPU computes.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b: tensor cores for 16-bit operands, true float32 (never tf32) for float32 ones."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def to_bfloat16(x):
    """float32 to the nearest bfloat16, ties to even."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(dtype)


@triton.jit
def bfloat16_parts(x):
    """x = high + middle + low: three times 8 bits are float32's 24, and the exponents are the same.

    float16 parts would carry 11 bits each, but not a float32's range.
    """
    x = x.to(tl.float32)
    high = to_bfloat16(x)
    rest = x - high.to(tl.float32)
    middle = to_bfloat16(rest)
    low = to_bfloat16(rest - middle.to(tl.float32))
    return high, middle, low


@triton.jit
def dot_down(x, a, h):
    """h + x a, with a in x's dtype or finer.

    A float32 adapter over a 16-bit base must not be rounded to the base's dtype: the reference
    multiplies it in float32, and h would lose 16 bits. Upcasting x instead would need the float32
    units, some fifteen times slower, or tf32x3, which costs as much as six bfloat16 products and
    takes every tile of x through registers. So the small operand is split, exactly, and bfloat16 x
    goes to the tensor cores as it was loaded: three products, as accurate as float32's. float16 x
    has two parts itself (11 bits = 8 + 3); the product of the lowest two is below float32's last
    bit. The smallest terms are added first.
    """
    if x.dtype == a.dtype:
        h = dot(x, a, h)
    elif x.dtype == tl.float32:
        h = dot(x, a.to(tl.float32), h)
    else:
        a_high, a_middle, a_low = bfloat16_parts(a)
        if x.dtype == tl.bfloat16:
            x_high = x
        else:
            x_high, x_low, _ = bfloat16_parts(x)
            h = dot(x_low, a_middle, h)
            h = dot(x_low, a_high, h)
        h = dot(x_high, a_low, h)
        h = dot(x_high, a_middle, h)
        h = dot(x_high, a_high, h)
    return h


@triton.jit
def dot_up(h, b, acc, exact: tl.constexpr):
    """acc + h b for a float32 h; not `exact` where acc is about to be rounded to 16 bits.

    Then two bfloat16 parts of h and of b do, at any magnitude: they leave 2⁻¹⁶ of a product, where
    the rounding to come leaves 2⁻⁹ or 2⁻¹² of the sum.
    """
    if exact:
        acc = dot(h, b.to(tl.float32), acc)
    else:
        h_high, h_low, _ = bfloat16_parts(h)
        if b.dtype == tl.bfloat16:
            b_high = b
        else:
            b_high, b_low, _ = bfloat16_parts(b)
            acc = dot(h_high, b_low, acc)
        acc = dot(h_low, b_high, acc)
        acc = dot(h_high, b_high, acc)
    return acc


# The inner size of a true float32 product, whose operands lie in registers for all of it: 64 would not fit there.
INNER = tl.constexpr(16)


@triton.jit
def dot_float32(a, b, acc):
    """acc + a b for float32 operands, by halves of the inner size down to INNER."""
    if a.shape[1] > INNER:
        a_even, a_odd = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        b_even, b_odd = tl.split(tl.permute(tl.reshape(b, (b.shape[0] // 2, 2, b.shape[1])), (0, 2, 1)))
        acc = dot_float32(a_even, b_even, acc)
        acc = dot_float32(a_odd, b_odd, acc)
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit
def dot_whole(a, b, acc):
    """acc + a b for operands of any dtypes, without rounding: in float32 if one is."""
    if a.dtype == tl.float32 or b.dtype == tl.float32:
        acc = dot_float32(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit
def operand_parts(r, exact: tl.constexpr):
    """r for `dot_parts`: as it is or, if not `exact`, in two bfloat16 parts."""
    if exact:
        high, low = r, r
    else:
        high, low, _ = bfloat16_parts(r)
    return high, low


@triton.jit
def dot_parts(x, r_high, r_low, acc, exact: tl.constexpr):
    """acc + x r, for a sum that is about to be rounded to 16-bit x's dtype if not `exact`: the 2⁻¹⁶ that two parts of r
    leave is not seen. The smallest terms come first. 16-bit x goes in whole: 11 bits are 8 + 3.
    """
    if exact:
        acc = dot_float32(x.to(tl.float32), r_high, acc)
    else:
        if x.dtype == tl.float16:
            x_high, x_low, _ = bfloat16_parts(x)
            acc = dot(x_low, r_high, acc)
        else:
            x_high = x
        acc = dot(x_high, r_low, acc)
        acc = dot(x_high, r_high, acc)
    return acc
