"""Break each kernel in at least five ways and see which test notices.

    python tests/kernels/break_kernels.py [--only TEXT] [--markdown bench/results/breaks.md]

Each break is made in a copy, one at a time, and the kernel's tests run there until the first fails.
Exits with 1 where a break goes unnoticed, or no longer fits the source. Minutes, so not in the test
run; to be repeated when a kernel or its tests change.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from cjepa_fast.runtime.provenance import own_commit

ROOT = Path(__file__).resolve().parents[2]
TESTS = {  # by file or folder of kernels/
    "vicreg": "tests/kernels/test_kernels_vicreg_triton.py",
    "vicreg/position_statistics": "tests/kernels/test_kernels_vicreg_positions.py",
    "vicreg/position_matmuls": "tests/kernels/test_kernels_vicreg_positions.py",
    "sigreg": "tests/kernels/test_kernels_sigreg.py",
    "gather": "tests/kernels/test_kernels_gather_triton.py",
    "ema": "tests/kernels/test_kernels_ema.py",
    "fp8": "tests/kernels/test_kernels_fp8.py",
    "norm": "tests/kernels/test_kernels_norm.py",
    "common": "tests/kernels/test_kernels_norm.py",
    "gelu": "tests/kernels/test_kernels_gelu.py",
    "attention": "tests/kernels/test_kernels_attention.py",
}


class Break(NamedTuple):
    """In a function of a file, the first `old` becomes `new`."""

    file: str
    function: str
    what: str
    old: str
    new: str


def broken(file: str, function: str, *breaks: tuple[str, str, str]) -> list[Break]:
    return [Break(file, function, *one) for one in breaks]


LIVE = ("the last row dropped", "live = row < total", "live = row < total - 1")
WIDTH = ("columns beyond the first tile", "tl.program_id(1) * WIDTH + tl.arange", "tl.arange")
COPIES = ("one copy unsummed", "range(M)", "range(1, M)")
KEEP = ("the last column dropped", "(d < D)[None, :]", "(d < D - 1)[None, :]")

BREAKS = [
    *broken(
        "vicreg/tiles", "load_centred",
        ("mask after centring dropped", "tl.where(inside, z - first - rest, 0.0)",
         "z - first - rest"),
        ("second part of the mean dropped", "z - first - rest", "z - first"),
        ("last row dropped", "rows < n", "rows < n - 1"),
        ("last column dropped", "cols < D", "cols < D - 1"),
    ),
    *broken(
        "vicreg/columns", "_column_kernel",
        ("divisor: a whole stretch", "/ (end - begin)", "/ per_split"),
        ("first rows unsummed", "range(begin, end", "range(begin + BLOCK_N, end"),
        ("last row dropped", "per_split, n)", "per_split, n - 1)"),
        ("squares about zero", "cols, first, rest, end", "cols, first, 0.0, end"),
        ("one block for all", "(m * tl.num_programs(1) + tl.program_id(1))", "tl.program_id(1)"),
    ),
    *broken(
        "vicreg/columns", "_combine_kernel",
        ("mask of stretches dropped", "tl.where(inside, within + rows * away * away, 0.0)",
         "within + rows * away * away"),
        ("divisor n for n - 1", "/ (n - 1)", "/ n"),
        ("first stretches unsummed", "range(0, splits", "range(BLOCK_S, splits"),
        ("ragged stretch as a whole one", "tl.minimum(per_split, n - split * per_split)",
         "per_split + 0 * split"),
        ("last stretch dropped", "split < splits", "split < splits - 1"),
    ),
    *broken(
        "vicreg/forward", "_moment_kernel",
        ("diagonal tiles missing", "if i > j", "if i >= j"),
        ("low halves of x left out", "acc = dot(x_low, y_high, acc)", "acc += 0.0"),
        ("low halves of y left out", "acc = dot(x_high, y_low, acc)", "acc += 0.0"),
        ("last step unsummed", "tl.minimum(begin + per_split, D if GRAM else n)",
         "tl.minimum(begin + per_split, D if GRAM else n) - BLOCK_K"),
        ("every stretch from the start", "begin = split * per_split", "begin = 0 * split"),
        ("one tile's offset taken twice", "j * (j + 1) // 2 + i", "j * (j + 1) // 2"),
    ),
    *broken(
        "vicreg/forward", "_reduce_kernel",
        ("row mask dropped", "(a[:, None] < size) & (b < size)", "(a[:, None] >= 0) & (b < size)"),
        ("diagonal tile counted twice", "tl.where(i == j, 1.0, 2.0)", "2.0"),
        ("mirror image missing", "mask=inside & (i != j)", "mask=inside & (i > j)"),
        ("first stretch unsummed", "range(splits)", "range(1, splits)"),
        ("last column dropped", "(b < size)", "(b < size - 1)"),
        ("diagonal kept", "if not KEEP_DIAGONAL", "if KEEP_DIAGONAL"),
    ),
    *broken(
        "vicreg/forward", "_finish_kernel",
        ("column mask dropped", "(std >= gamma) | (col >= D)", "std >= gamma"),
        ("divisor without M", "tl.sum(hinge) / (M * D)", "tl.sum(hinge) / D"),
        ("one block unsummed", "range(M)", "range(1, M)"),
        ("last piece dropped", "lane < pieces", "lane < pieces - 1"),
        ("the Gram's diagonal kept", "cov -= tl.sum(diagonal)", "cov -= 0.0"),
    ),
    *broken(
        "vicreg/backward", "_grad_kernel",
        ("divisor: 2 for 4", "4 * scale", "2 * scale"),
        ("low half of the matrix left out", "acc = dot(x_high, y_low, acc)", "acc += 0.0"),
        ("the Gram's diagonal kept", "slope -= slope_cov * variance", "slope -= 0.0"),
        ("last row of the matrix dropped", "k[:, None] < size", "k[:, None] < size - 1"),
        ("last column dropped", "(rows < n) & (cols < D)", "(rows < n) & (cols < D - 1)"),
        ("hinge everywhere", "std < gamma, -scale", "std >= 0, -scale"),
    ),
    *broken(
        "vicreg/position_statistics", "_load_tokens",
        ("last column dropped", "(d < D)[None, :]", "(d < D - 1)[None, :]"),
        ("wrong token unmarked", 'tl.where((row >= T)[:, None], float("nan"), x)', "x"),
        ("last token dropped", "& (row < T))", "& (row < T - 1))"),
    ),
    *broken(
        "vicreg/position_statistics", "_position_statistics_kernel",
        ("first images unsummed", "in range(0, B", "in range(BLOCK_B, B"),
        ("no token counts as one", "row >= 0, 1.0, 0.0", "row >= -1, 1.0, 0.0"),
        ("no token is one of value 0", "x = tl.where((row >= 0)[:, None], x, 0.0)", "x = x"),
        ("squares about zero", "D) - first[None, :]", "D) - 0.0 * first[None, :]"),
        ("second part of the mean left out", "rest = tl.sum(total, 0) / divisor",
         "rest = 0.0 * tl.sum(total, 0)"),
        ("one position for all", "n + tl.zeros((BLOCK_B,), tl.int32)",
         "tl.zeros((BLOCK_B,), tl.int32)"),
        ("the last token without a position", "own = (row >= 0) & (row < T)",
         "own = (row >= 0) & (row < T - 1)"),
    ),
    *broken(
        "vicreg/position_statistics", "_position_deviations_kernel",
        ("last token dropped", "inside = (t < T)[:, None]", "inside = (t < T - 1)[:, None]"),
        ("padding kept", "live = inside & (n >= 0)", "live = inside"),
        ("second part of the mean dropped", "x - first - rest", "x - first"),
        ("one mean for all", "mean + n * D + d[None, :]", "mean + 0 * n + d[None, :]"),
        ("both parts the high one", "x -= value.to(tl.float32)", "x -= 0.0"),
        ("last column dropped", "(d < D)[None, :]", "(d < D - 1)[None, :]"),
    ),
    *broken(
        "vicreg/position_statistics", "_position_hinge_kernel",
        ("divisor: the count", "tl.load(count + n) - 1.0", "tl.load(count + n) - 0.0"),
        ("column mask dropped", "(std >= gamma) | (d >= D)", "std >= gamma"),
        ("positions weigh alike", "free * tl.sum(total)", "tl.sum(total)"),
        ("first columns unsummed", "range(0, D", "range(BLOCK, D"),
        ("one position for all", "tl.load(squares + n * D + d", "tl.load(squares + d"),
    ),
    *broken(
        "vicreg/position_statistics", "_position_finish_kernel",
        ("empty positions subtract",
         "tl.maximum(tl.load(count + n, mask=n < N, other=0.0) - 1.0, 0.0)",
         "tl.load(count + n, mask=n < N, other=1.0) - 1.0"),
        ("first positions unsummed", "range(0, N", "range(BLOCK, N"),
        ("first pieces unsummed", "range(0, pieces", "range(BLOCK, pieces"),
        ("unit not squared", "scale * scale", "scale"),
        ("divisor: 2 for 4", "4.0 * scale", "2.0 * scale"),
        ("division by 0", "tl.maximum(tl.sum(free), 1.0)", "tl.sum(free)"),
    ),
    *broken(
        "vicreg/position_matmuls", "_add_product",
        ("low halves of x left out",
         "acc = dot(tl.load(x_ptr + x_plane, mask=keep_x, other=0.0), y, acc)", "acc += 0.0"),
        ("low halves of y left out",
         "acc = dot(x, tl.load(y_ptr + y_plane, mask=keep_y, other=0.0), acc)", "acc += 0.0"),
        ("the last product alone of fp32", "tl.dot(x, y, acc, input", "tl.dot(x, y, input"),
    ),
    *broken(
        "vicreg/position_matmuls", "_position_moment_kernel",
        ("diagonal tiles missing", "if i > j", "if i >= j"),
        ("every stretch from the start", "begin = split * per_split", "begin = 0 * split"),
        ("last token of a stretch dropped", "(t < end)[None, :]", "(t < end - 1)[None, :]"),
        ("last column dropped", "(t < end)[:, None] & (b < D)", "(t < end)[:, None] & (b < D - 1)"),
        ("one tile's offset taken twice", "j * (j + 1) // 2 + i", "j * (j + 1) // 2"),
        ("all stretches in one place", "split.to(tl.int64) * (side * (side + 1) // 2)", "0"),
    ),
    *broken(
        "vicreg/position_matmuls", "_position_grad_kernel",
        ("one position for all", "variance + n * D + d[None, :]", "variance + 0 * n + d[None, :]"),
        ("hinge everywhere", "std < gamma", "std >= 0"),
        ("unit left out", "unit * acc", "acc"),
        ("last column dropped", "(t < T)[:, None] & (d < D)[None, :]",
         "(t < T)[:, None] & (d < D - 1)[None, :]"),
        ("last row of the matrix dropped", "keep_y = (k < D)", "keep_y = (k < D - 1)"),
        ("first columns unsummed", "range(0, tl", "range(BLOCK_K, tl"),
        ("units without a factor", "tl.abs(slope_cov) < 1e-30", "tl.abs(slope_cov) < 0.0"),
    ),
    *broken(
        "gather/tokens", "_gather_forward_kernel",
        LIVE, WIDTH, KEEP,
        ("index mask dropped", "keep = (live & inside)", "keep = (live & live)"),
        ("divisor N for S", "image = row // S", "image = row // N"),
        ("position not added", "value.to(tl.float32) + added.to(tl.float32)",
         "value.to(tl.float32) + 0.0 * added"),
    ),
    *broken(
        "gather/tokens", "_gather_backward_kernel",
        WIDTH, KEEP,
        ("match mask dropped", "keep = (match < S)[:, None]", "keep = (match <= S)[:, None]"),
        ("repeated index unsummed", "total += tl.load", "total = tl.load"),
        ("divisor of the images", "tl.program_id(0) // tiles", "tl.program_id(0) // (tiles + 1)"),
        ("second search unmade", "range(0, S, BLOCK_S)", "range(0, BLOCK_S, BLOCK_S)"),
        ("last index dropped", "mask=s < S,", "mask=s < S - 1,"),
    ),
    *broken(
        "gather/targets", "_target_rows",
        ("mask beyond D dropped", "x = tl.where(real, x - mean[:, None], 0.0)",
         "x = x - mean[:, None]"),
        ("divisor D - 1", "tl.sum(x * x, 1) / D", "tl.sum(x * x, 1) / (D - 1)"),
        ("second centring left out", "x - (tl.sum(x, 1) / D)[:, None]", "x"),
        ("eps left out", "variance + eps", "variance"),
        ("divisor N for S", "row // S", "row // N"),
        ("wrong index unmarked", "tl.where(inside, tl.sum(x, 1) / D, nan)", "tl.sum(x, 1) / D"),
    ),
    *broken("gather/targets", "_target_gather_kernel", LIVE, KEEP),
    *broken(
        "gather/targets", "_prediction_loss_kernel",
        LIVE, KEEP,
        ("half left out", "0.5 * square", "square"),
        ("no difference beyond 1", "size - 0.5", "size"),
        ("one partial sum for all", "partial + tl.program_id(0)", "partial"),
    ),
    *broken(
        "gather/targets", "_prediction_slope_kernel",
        LIVE, KEEP,
        ("mean left out", ".to(tl.float32) * share", ".to(tl.float32)"),
        ("divisor of l2", "2.0 * error", "error"),
        ("sign below -1", "error < -1.0, -1.0", "error < -1.0, 1.0"),
        ("upstream left out", "tl.load(upstream).to(tl.float32) * share", "share"),
    ),
    *broken(
        "gather/predictor", "_predictor_input_kernel",
        WIDTH,
        ("last row dropped", "mask=(row < K + P)[:, None]", "mask=(row < K + P - 1)[:, None]"),
        ("one copy unwritten", "range(M)", "range(1, M)"),
        ("first query taken for context", "(row >= K)", "(row > K)"),
        ("targets shifted by one", "* P + row - K,", "* P + row - K - 1,"),
        ("last column dropped", "real = (d < W)", "real = (d < W - 1)"),
    ),
    *broken(
        "gather/predictor", "_predictor_input_backward_kernel",
        WIDTH, COPIES,
        ("first query unsummed", "(row >= K)", "(row > K)"),
        ("first tile of queries dropped", "slot >= 0", "slot > 0"),
        ("last row dropped", "(row < K + P)", "(row < K + P - 1)"),
    ),
    *broken(
        "ema/lists", "lerp",
        ("one end inexact", "new - (new - old) * (1.0 - weight)", "new - (new - old) * weight"),
        ("half the step", "old + weight * (new - old)", "old + 0.5 * weight * (new - old)"),
    ),
    *broken(
        "ema/lists", "chunk_of_program",
        ("last value dropped", "size - start", "size - start - 1"),
        ("a chunk too far", "(tl.program_id(0) - first) * CHUNK",
         "(tl.program_id(0) - first) * (CHUNK + 1)"),
    ),
    *broken(
        "ema/plain_update", "_ema_kernel",
        ("mask of the tail dropped", "tl.arange(0, CHUNK) < rest", "tl.full((CHUNK,), 1, tl.int1)"),
        ("last value of the tail dropped", "CHUNK) < rest", "CHUNK) < rest - 1"),
        ("copy written over the online", "address(pointers, 2,", "address(pointers, 1,"),
    ),
    *broken(
        "ema/plain_update", "_ema_chunk",
        ("copy of the weights", "narrow(value, copy", "narrow(tl.load(online + at), copy"),
        ("mask of the copy dropped", "copy.dtype.element_ty), mask=keep", "copy.dtype.element_ty)"),
    ),
    *broken(
        "ema/rows_update", "_ema_rows_kernel",
        ("last value of a row dropped", "col < COLS", "col < COLS - 1"),
        ("not rounded to bf16", "narrow(ema, tl.bfloat16).to(tl.float32)", "ema"),
        ("one scale for all rows", "start // COLS", "0 * start"),
        ("FP8 of the weights", "narrow(ema, tl", "narrow(new, tl"),
        ("maximum of the positive", "tl.max(tl.abs(value), 1)", "tl.max(value, 1)"),
    ),
    *broken(
        "fp8", "scales_of",
        ("half the range", "tl.div_rn(LARGEST, largest)", "tl.div_rn(0.5 * LARGEST, largest)"),
        ("scale upside down", "tl.div_rn(largest, LARGEST)", "tl.div_rn(LARGEST, largest)"),
        ("zeros unsafe", "tl.maximum(largest, SMALLEST)", "largest"),
    ),
    *broken(
        "fp8", "_normed",
        ("mask beyond C dropped", "value if FULL else", "value if True else"),
        ("divisor C - 1", "tl.sum(spread, 1) / C", "tl.sum(spread, 1) / (C - 1)"),
        ("mean of the last piece", "total += values[piece]", "total = values[piece]"),
        ("spread of the last piece", "spread += value * value", "spread = value * value"),
        ("eps left out", "/ C + eps", "/ C"),
        ("shift left out", "+ shift[None, :]", "+ 0.0 * shift[None, :]"),
        ("gain left out", "* gain[None, :]", ""),
        ("the first piece's gain for all", "here = piece * WIDTH + col", "here = col"),
    ),
    *broken(
        "fp8", "_quantise_kernel",
        ("last row dropped", "live = row < rows", "live = row < rows - 1"),
        ("last column dropped", "(FULL | (here < C))[None, :]", "(here < C - 1)[None, :]"),
        ("no GELU", "value = gelu_of(value)", "value = value"),
        ("tanh's GELU not tanh's", "value = tanh_gelu_of(value)", "value = gelu_of(value)"),
        ("the sum not written", "tl.store(s + at, total, mask=keep)", "total = total"),
        ("the branch left out", "value += tl.load(y + at", "value += 0.0 * tl.load(y + at"),
        ("maximum of the positive", "largest = tl.abs(found[0])", "largest = found[0]"),
        ("maximum of the first piece", "tl.maximum(largest, tl.abs(found[piece]))", "largest"),
        ("the first piece for all", "here = piece * WIDTH + col", "here = col"),
        ("last scale dropped", "scale, mask=live)", "scale, mask=row < rows - 1)"),
    ),
    *broken(
        "norm", "_add_norm_kernel",
        ("last row dropped", "live = row < rows", "live = row < rows - 1"),
        ("last column dropped", "real = FULL | (here < D)", "real = here < D - 1"),
        ("last column not read", "(FULL | (here < D))[None", "(here < D - 1)[None"),
        ("the first piece for all", "here = piece * WIDTH + col", "here = col"),
        ("the sum not rounded first", "value = rounded.to(tl.float32)", "value = value + added"),
        ("mask after centring dropped", "value if FULL else", "value if True else"),
        ("mean of the last piece", "total += value", "total = value"),
        ("spread of the last piece", "spread += value * value", "spread = value * value"),
        ("eps left out", "/ D + eps", "/ D"),
        ("shift left out", "+ shift[None, :]", "+ 0.0 * shift[None, :]"),
        ("statistics of another row", "tl.store(stats + rows + row", "tl.store(stats + rows"),
    ),
    *broken(
        "norm", "_add_norm_backward_kernel",
        ("share of the first program for all", "begin = tl.program_id(0) * each", "begin = 0"),
        ("last rows of a share dropped", "begin + each, rows)", "begin + each - ROWS, rows)"),
        ("gradient from elsewhere left out", "result += tl.load(ds", "result += 0.0 * tl.load(ds"),
        ("mean of the gradient left in", "(grads[piece] - total[:, None]", "(grads[piece]"),
        ("mean of the last piece's gradient", "total += grad", "total = grad"),
        ("slope along the last piece", "along += grad * value", "along = grad * value"),
        ("gain left out of the gradient", "grad *= gains[piece].to(tl.float32)[None, :]",
         "grad *= 1.0"),
        ("the first piece's gain for all", "gains[piece]", "gains[0]"),
        ("the first piece's dweight for all", "(dweight[piece] + grad", "(dweight[0] + grad"),
        ("the first piece's dbias for all", "(dbias[piece] + grad", "(dbias[0] + grad"),
        ("the first piece's dy_bias for all", "(dy_bias[piece] + ", "(dy_bias[0] + "),
        ("dweight of gained gradients", "grad * value,)", "grad * gains[piece] * value,)"),
        ("the branch's bias takes dh", "rounded.to(tl.float32),)", "grads[piece],)"),
        ("sums exchanged", "pointer + D, tl.sum(dbias", "pointer + D, tl.sum(dweight"),
    ),
    *broken(
        "common/sums", "_sum_parts_kernel",
        ("last part dropped", "row < P)", "row < P - 1)"),
        ("first parts unsummed", "range(0, P", "range(ROWS, P"),
        ("one tile for all", "tl.program_id(0) * WIDTH + tl", "tl"),
        ("last column dropped", "mask=col < C)", "mask=col < C - 1)"),
        ("the last parts alone", "total += tl.load", "total = tl.load"),
    ),
    *broken(
        "gelu", "_normal",
        ("tanh's own constant", "0.23164190", "0.33"),
        ("one coefficient off", "1.421413741", "1.4214"),
        ("exponent twice as large", "-0.72134752", "-1.44269504"),
        ("both sides alike", "tl.where(u >= 0, 1.0 - tail, tail)", "1.0 - tail"),
        ("tail twice as large", "0.5 * t * (", "1.0 * t * ("),
    ),
    *broken(
        "gelu", "_logistic",
        ("cube without a bound", "tl.minimum(tl.abs(u), 16.0)", "tl.abs(u)"),
        ("cube left out", "(1.0 + 0.044715 * square)", "1.0"),
        ("exponent half as large", "-2.3022082", "-1.1511041"),
        ("both sides alike", "tl.where(u >= 0, 1.0 - tail, tail)", "1.0 - tail"),
        ("slope of the line alone", "0.21406445 * square", "0.0 * square"),
        ("slope without the other tail", "tail * (1.0 - tail)", "tail"),
    ),
    *broken(
        "gelu", "_gelu_kernel",
        ("exact for tanh", "tanh_gelu_of(value) if TANH else", "gelu_of(value) if TANH else"),
    ),
    *broken(
        "gelu", "_gelu_backward_kernel",
        ("density of tanh's left out", "below + value * density", "below"),
        ("density left out", "below + value * exponential * 0.39894228", "below"),
        ("last rows of a share dropped", "begin + each, rows)", "begin + each - ROWS, rows)"),
        ("one share for all", "begin = tl.program_id(1) * each", "begin = 0"),
        ("last column dropped", "(col < C)[None, :]", "(col < C - 1)[None, :]"),
        ("sums of the first rows alone", "total += rounded", "total = rounded"),
        ("parts of one program", "parts + tl.program_id(1) * C", "parts"),
    ),
    *broken(
        "attention/forward", "_attention_kernel",
        ("output not shrunk", "out0 * shrunk[:, None]", "out0"),
        ("second part of a head not shrunk", "out1 * shrunk[:, None]", "out1"),
        ("not divided by the sum", "out0 / total[:, None]", "out0"),
        ("another block's queries", "row = block * ROWS +", "row ="),
        ("log of the sum alone", "most + tl.log2(total)", "tl.log2(total)"),
        ("keys of the first sequence", "k += sequence * k_batch + head * d", "k += head * d"),
    ),
    *broken(
        "attention/heads", "weigh",
        ("keys beyond the last seen", "tl.where(there[None, :], scores, -float(\"inf\"))",
         "scores"),
        ("sum not shrunk", "total * shrunk", "total"),
    ),
    *broken(
        "attention/descriptor_forward", "_attention_descriptor_kernel",
        ("second part of the queries is the first", "block * ROWS, D0, ROWS, D1)",
         "block * ROWS, 0, ROWS, D1)"),
        ("second part of the values is the first", "start, D0, COLS, D1), out1",
         "start, 0, COLS, D1), out1"),
        ("keys of the first block alone", "_load(k, image, head, start", "_load(k, image, head, 0"),
        ("queries of the first block alone", "_load(q, image, head, block * ROWS",
         "_load(q, image, head, 0"),
        ("one head's values for all", "_load(v, image, head", "_load(v, image, 0"),
        ("keys that are not there seen", "tl.arange(0, COLS) < T", "tl.arange(0, COLS) < T + 1"),
        ("output not shrunk", "out0 * shrunk[:, None]", "out0"),
        ("not divided by the sum", "out0 / total[:, None]", "out0"),
        ("log of the sum alone", "most + tl.log2(total)", "tl.log2(total)"),
    ),
    *broken(
        "attention/descriptor_forward", "descriptors",
        ("a head as wide as its row", "[B, heads, S, d]", "[B, heads, S, width]"),
        ("a token too many", "[B, heads, S, d]", "[B, heads, S + 1, d]"),
        ("heads apart by their tiles", "[x.stride(0), d,", "[x.stride(0), split(d)[0],"),
    ),
    *broken(
        "attention/descriptor_forward", "describable",
        ("any address", "x_BSX.data_ptr() % ALIGNED == 0", "True"),
        ("any width of a head", "(*strides(x_BSX), d)", "strides(x_BSX)"),
    ),
    *broken(
        "attention/one_pass_backward", "_step",
        ("keys that are not there seen", "tl.where(live[None, :], weights, 0.0)", "weights"),
        ("delta left out", " - delta[:, None])", ")"),
        ("values' gradient of slopes", "dv0 = dot(tl.trans(low), do0, dv0)",
         "dv0 = dot(tl.trans(narrow(weights * 0.5, q0.dtype)), do0, dv0)"),
        ("second part of dq left out", "dq1 = dot(slopes, k1, dq1)", "dq1 = dq1"),
        ("second part of dk left out", "dk1 = dot(tl.trans(slopes), q1, dk1)", "dk1 = dk1"),
        ("scale left out", "* scale - lse", "- lse"),
    ),
    *broken(
        "attention/one_pass_backward", "_attention_backward_kernel",
        ("keys not scaled", "dk0, dk1 = dk0 * factor", "dk0, dk1 = dk0"),
        ("queries not scaled", "dqa0, dqa1 = dqa0 * factor", "dqa0, dqa1 = dqa0"),
        ("second queries left out of the sums", "total0 + tl.sum(dqb0, 0)", "total0"),
        ("sums of the last keys alone", "sum_k0 += tl.sum", "sum_k0 = tl.sum"),
        ("sums of keys that are not there", "tl.where(live[:, None], dv0, 0.0)", "dv0 + 1.0"),
        ("keys' sums for the values", "2 * H * d, sum_v0", "2 * H * d, sum_k0"),
        ("one head's gradient for all", "dq += sequence * dq_batch + head * d",
         "dq += sequence * dq_batch"),
    ),
    *broken(
        "attention/heads", "store_parts",
        ("second part of a head not written", "if D1 > 0:", "if D1 > 64:"),
    ),
    *broken(
        "attention/heads", "store_sums",
        ("second part's sums at the first's", "parts + rest", "parts + rest - D0"),
    ),
    *broken(
        "attention/two_pass_backward", "_attention_queries_kernel",
        ("keys that are not there seen", "tl.where(there[None, :], weights, 0.0)", "weights"),
        ("delta left out", " - delta_r[:, None])", ")"),
        ("delta not kept", "delta_r, mask=live)", "delta_r * 0.0, mask=live)"),
        ("second part of dq left out", "dq1 = dot(slopes, k1, dq1)", "dq1 = dq1"),
        ("keys of the first block alone", "block * ROWS < S, T, 0)", "block * ROWS < S, COLS, 0)"),
        ("another block's queries", "        block * ROWS, ROWS,", "        0, ROWS,"),
        ("queries not scaled", "dq0, dq1 = dq0 * factor", "dq0, dq1 = dq0"),
        ("parts of one block", "(sequence * blocks + block) * 3", "(sequence * blocks) * 3"),
    ),
    *broken(
        "attention/two_pass_backward", "_attention_keys_kernel",
        ("keys that are not there seen", "tl.where(live[:, None], weights, 0.0)", "weights"),
        ("delta left out", " - delta_c[None, :])", ")"),
        ("another block's keys", "row = block * ROWS +", "row ="),
        ("queries of the first block alone", "block * ROWS < T, S, 0)",
         "block * ROWS < T, COLS, 0)"),
        ("second part of dk left out", "dk1 = dot(slopes, q1, dk1)", "dk1 = dk1"),
        ("second part of dv left out", "dv1 = dot(low, do1, dv1)", "dv1 = dv1"),
        ("keys not scaled", "dk0, dk1 = dk0 * factor", "dk0, dk1 = dk0"),
        ("keys' sums for the values", "2 * H * d, tl.sum(dv0, 0)", "2 * H * d, tl.sum(dk0, 0)"),
        ("one head's delta for all", "delta += (sequence * H + head) * S",
         "delta += sequence * H * S"),
    ),
    *broken(
        "ema/adamw", "_adamw_ema_kernel",
        ("one value beyond the tail", "tl.arange(0, CHUNK) < rest", "tl.arange(0, CHUNK) <= rest"),
        ("copies exchanged", "address(pointers, target_copies,", "address(pointers, copies,"),
        ("a bad step taken", "if tl.load(numbers + 9) == 0.0:", "if tl.load(numbers + 9) == 2.0:"),
    ),
    *broken(
        "ema/adamw", "_adamw_ema_chunk",
        ("square left out", "square_share * g * g", "square_share * g"),
        ("bias correction left out", "tl.div_rn(tl.sqrt_rn(second), root_scale)",
         "tl.sqrt_rn(second)"),
        ("decay left out", "* decay - lr", "- lr"),
        ("scale left out", ".to(tl.float32) * scale", ".to(tl.float32)"),
        ("eps left out", ", root_scale) + eps", ", root_scale)"),
        ("EMA of the old weights", "mask=keep), w, weight)",
         "mask=keep), tl.load(param + at, mask=keep), lerp1)"),
    ),
    *broken(
        "sigreg/tiles", "cos_sin",
        ("rounded down", "* 0.63661977 + 0.5)", "* 0.63661977)"),
        ("last part of pi left out", " - quarters * _HALF_PI_3", ""),
        ("second part of pi left out", "- quarters * _HALF_PI_2", ""),
        ("one quarter not exchanged", "(quarter == 1.0) | (quarter == 3.0)\n", "quarter == 1.0\n"),
        ("sign of the cosine", "(quarter == 1.0) | (quarter == 2.0)", "quarter == 2.0"),
        ("sign of the sine", "tl.where(quarter >= 2.0, -sin, sin)", "sin"),
        ("last terms left out", "(-1 / 5040 + s * (1 / 362880))", "(-1 / 5040)"),
    ),
    *broken(
        "sigreg/tiles", "load_rows",
        ("one row more than there is", "slot < n", "slot <= n"),
        ("the first group for all", "group.to(tl.int64) * n + slot", "slot"),
        ("beyond the end is row 0", "other=-1", "other=0"),
    ),
    *broken(
        "sigreg/tiles", "projected",
        ("last column dropped", "(d < D)[None, :]", "(d < D - 1)[None, :]"),
        ("first columns unsummed", "range(0, D", "range(BLOCK_D, D"),
        ("wrong row unmarked", 'tl.where((row >= T)[:, None], float("nan"), acc)', "acc"),
        ("sum of the last columns alone", "tl.dot(x, a, acc,", "tl.dot(x, a,"),
    ),
    *broken(
        "sigreg/forward", "_sums_kernel",
        ("no row counts as one", "live = (row >= 0)[:, None]", "live = (row >= -1)[:, None]"),
        ("sines over the cosines", "parts + (Q + q) * K", "parts + q * K"),
        ("rotated the other way", "sin * cos1 + cos * sin1", "sin * cos1 - cos * sin1"),
        ("all stretches in one place", "tl.program_id(2).to(tl.int64) * tl.num_programs(1)",
         "0"),
        ("last direction dropped", "mask=k < K", "mask=k < K - 1"),
        ("the first rows for all", "tl.program_id(2) * BLOCK_N + tl.arange", "tl.arange"),
    ),
    *broken(
        "sigreg/backward", "_slopes_kernel",
        ("first knot for all", "t = (q + 1) * step", "t = step"),
        ("sines left out", "imaginary = turned - dsin", "imaginary = turned"),
        ("last rotation left out", "-(real * sin + imaginary * cos)", "-imaginary"),
        ("knots in the other order", "q = Q - 1 - back", "q = back"),
        ("one group's slopes for all", "tl.program_id(1).to(tl.int64) * 2 * Q * K + k", "k"),
        ("last direction dropped", "& (k < K)[None, :]", "& (k < K - 1)[None, :]"),
    ),
    *broken(
        "sigreg/backward", "_rows_kernel",
        ("last row dropped", "(row < T)[:, None] & (d < D)", "(row < T - 1)[:, None] & (d < D)"),
        ("last column dropped", "& (d < D)[None, :]\n", "& (d < D - 1)[None, :]\n"),
        ("first directions unsummed", "range(0, K", "range(BLOCK_K, K"),
        ("one tile of rows for all", "tl.program_id(0).to(tl.int64) * BLOCK_T", "0"),
        ("the last directions alone", "tl.dot(slope, a, acc,", "tl.dot(slope, a,"),
    ),
]  # fmt: skip


def tests_of(one: Break) -> str:
    return TESTS.get(one.file) or TESTS[one.file.partition("/")[0]]


def text_of(one: Break) -> str:
    return (ROOT / "kernels" / f"{one.file}.py").read_text()


def source_with(one: Break) -> str:
    """The file's text with the break in it. Raises ValueError where it does not fit."""
    text = text_of(one)
    start = text.index(f"def {one.function}(")
    end = text.find("\n\n\n", start)
    body = text[start:end]
    if one.old not in body:
        raise ValueError(f"{one.function} no longer holds {one.old!r}")
    return text[:start] + body.replace(one.old, one.new, 1) + text[end:]


def caught_by(one: Break, tree: Path) -> str | None:
    """The first test that fails with this break in the copy, None where none does."""
    target = tree / "kernels" / f"{one.file}.py"
    whole = target.read_text()
    target.write_text(source_with(one))
    try:
        return first_failure(tests_of(one), tree)
    finally:
        target.write_text(whole)


def first_failure(tests: str, tree: Path) -> str | None:
    """The first of a file of tests that fails in the copy, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    # without PYTHONPATH the installed package would be tested, not the copy
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}
    done = subprocess.run(
        [*command, tests], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.M)
    return found.group(1) if found else f"the process ended with status {done.returncode}"


def copied_tree(folder: Path) -> Path:
    """A copy of what the kernels' tests need, its kernels/ imported as cjepa_fast.kernels."""
    tree = folder / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cjepa_fast", "kernels", "configs", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    link = tree / "cjepa_fast" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="kernels whose name has this text")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    lines = ["| kernel or its part | break | noticed by |", "|---|---|---|"]
    chosen = [one for one in BREAKS if args.only in f"{one.file}.{one.function}"]
    if not chosen:
        parser.error(f"--only {args.only}: no kernel has that in its name")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied_tree(Path(folder))
        for tests in dict.fromkeys(map(tests_of, chosen)):  # or every break would seem noticed
            if (wrong := first_failure(tests, tree)) is not None:
                raise SystemExit(f"{tests}: {wrong} fails without a break")
        for one in chosen:
            noticed = caught_by(one, tree)
            missed += noticed is None
            lines.append(f"| {one.file}.{one.function} | {one.what} | {noticed or 'NOTHING'} |")
            print(lines[-1], flush=True)
    if args.markdown:
        heading = (
            "# Kernels broken on purpose, and the tests that noticed\n\n`python "
            "tests/kernels/break_kernels.py --markdown bench/results/breaks.md`, each break alone. "
            f"Commit {own_commit()}.\n\n"
        )
        args.markdown.write_text(heading + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 2} breaks, {missed} unnoticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
