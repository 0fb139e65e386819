"""benchmarks/hlo.py: figures from the text of optimised HLO, without any compiler."""

import pytest

from tests.helpers import bench_scripts

pytest.importorskip("matplotlib", reason="benchmarks need jaxlora[bench]")

TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (param_0: bf16[8,128]) -> bf16[8,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%param_0), backend_config={"estimated_cycles":"1000000"}
}

%inner_body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  ROOT %fusion.3 = bf16[8,128]{1,0} fusion(%state), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"2"}
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %fusion.2 = bf16[8,128]{1,0} fusion(%state), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"30"}
  ROOT %while.2 = (s32[], bf16[8,128]) while(%fusion.2), condition=%condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"5"}}
}

%called (x: bf16[8,128]) -> bf16[8,128] {
  ROOT %fusion.4 = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"700"}
}

ENTRY %main.1 (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state[0][\\'kernel\\']"}
  %copy-start.1 = (bf16[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %fusion.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=1*/f32[8]{0}) fusion(%x), kind=kLoop, calls=%fused.1, \
backend_config={"estimated_cycles":"4000"}
  %while.1 = (s32[], bf16[8,128]) while(%fusion.1), condition=%condition, body=%body, metadata={op_name="while"}
  %call.1 = bf16[8,128]{1,0} call(%while.1), to_apply=%called
  %async-start.1 = bf16[8,128]{1,0} async-start(%call.1), calls=%called, backend_config={"estimated_cycles":"50000"}
  ROOT %done = bf16[8,128]{1,0} async-done(%async-start.1)
}
"""

GPU = """HloModule jit_step, is_scheduled=true

%body (state: f32[4,8]) -> f32[4,8] {
  %state = f32[4,8]{1,0} parameter(0)
  %weight = f32[8,8]{1,0} constant({...})
  ROOT %gemm.2 = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%state, %weight), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}

ENTRY %main.1 (x: bf16[2,16,32], y: bf16[2,32,8]) -> bf16[2,16,8] {
  %x = bf16[2,16,32]{2,1,0} parameter(0)
  %y = bf16[2,32,8]{2,1,0} parameter(1)
  %gemm.1 = (bf16[2,16,8]{2,1,0}, s8[100]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}
  %out = bf16[2,16,8]{2,1,0} get-tuple-element(%gemm.1), index=0
  %bitcast.1 = bf16[32,8]{1,0} bitcast(%out)
  %sum = f32[4,8]{1,0} fusion(%bitcast.1, %x), kind=kLoop, calls=%fused
  %softmax = bf16[10]{0} custom-call(%sum), custom_call_target="__other"
  %while.1 = f32[4,8]{1,0} while(%sum), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %copy.1 = f32[4,8]{0,1} copy(%while.1)
}
"""


@pytest.fixture(scope="module")
def hlo():
  with bench_scripts.modules("hlo") as bench:
    yield bench.hlo


def test_cycles_are_of_what_runs_as_often_as_it_does(hlo):
  """A loop that does not say how often it runs is taken to run once a layer; the inside of a fusion is not counted."""
  assert hlo.cycles(TPU, trips=7) == 4000 + 7 * (30 + 5 * 2) + 700 + 50000


def test_gemms_and_what_runs_between_them(hlo):
  found = hlo.gemms(GPU, trips=7)
  assert found.calls == 1 + 3
  assert found.flops == 2 * (2 * 16 * 8) * 32 + 3 * 2 * (4 * 8) * 8
  operands_and_results = 2 * (2 * 16 * 32 + 2 * 32 * 8 + 2 * 16 * 8) + 100
  assert found.bytes == operands_and_results + 3 * (4 * (32 + 64 + 32) + 64)
  fusion, other, copy = 2 * 32 * 8 + 2 * 2 * 16 * 32 + 4 * 32, 4 * 32 + 2 * 10, 2 * 4 * 32
  assert found.bytes_outside == fusion + other + copy


@pytest.mark.parametrize(
  ("type_", "size"),
  [
    ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
    ("(s32[], pred[3]{0}, /*index=2*/f8e4m3fn[5]{0})", 12),
    ("c64[2]", 16),
    ("s4[3]", 2),
    ("token[]", 0),
    ("f32[0,4]", 0),
  ],
)
def test_bytes_of_a_type(hlo, type_, size):
  assert hlo.bytes_of(type_) == size


def test_text_without_an_entry_is_an_error(hlo):
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.cycles("module @jit_step {}", 1)


PRODUCTS = """HloModule jit_step, is_scheduled=true

%hidden (p: bf16[2,8]) -> bf16[4,16] {
  %p = bf16[2,8]{1,0} parameter(0)
  %w = bf16[16,8]{1,0} constant({...})
  %gathered = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %product = bf16[4,16]{1,0} convolution(%gathered, %w), dim_labels=bf_oi->bf
}

%condition (state: s32[]) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%state, %bound), direction=LT
}

%body (state: s32[]) -> s32[] {
  %fusion.1 = bf16[4,16]{1,0} fusion(%state), kind=kCustom, calls=%hidden
  ROOT %dot = f32[5,6]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %left = f32[5,7]{1,0} parameter(0)
}

ENTRY %main (x: bf16[2,8]) -> f32[2,2048,2,2048] {
  %fusion.2 = bf16[4,16]{1,0} fusion(%x), kind=kCustom, calls=%hidden
  %while = s32[] while(%x), condition=%condition, body=%body
  %key = bf16[2,64,1,10]{3,2,1,0} parameter(1)
  ROOT %heads = f32[2,9,2,10]{1,3,2,0} convolution(%query, %key), window={size=2x1 lhs_dilate=2x1}, \
dim_labels=b01f_0i1o->0b1f
}
"""


def test_products_and_collectives_are_found_inside_of_fusions(hlo):
  """As often as a loop's condition says; a collective that begins in one fusion and ends in another is one."""
  assert hlo.communicated(PRODUCTS, trips=99) == {"all-gather": 4 * 8 * 2}
  hidden, dot, heads = 2 * 4 * 16 * 8, 2 * 5 * 6 * 7, 2 * (2 * 9 * 2 * 10) * 64  # the dilated axis is a batch
  assert hlo.product_flops(PRODUCTS, trips=99) == 4 * hidden + 3 * dot + heads
