"""The cycles of a compiled TPU program, summed from its text: loops, branches, fusions, gathers and sorts."""

import pytest

from tests.harness.tpu_cycles import GATHERED_ELEMENT, GATHERED_ROW, SORTED_TILE, counted


def cost(cycles: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":["1"]}}}}'


# A loop of 5 trips with a conditional in it, a fusion whose inner operation also has a figure, and a call.
PROGRAM = f"""HloModule jit_f, is_scheduled=true, entry_computation_layout={{(f32[8]{{0}})->f32[8]{{0}}}}

%fused (p.0: f32[8]) -> f32[8] {{
  %p.0 = f32[8]{{0:T(256)}} parameter(0)
  ROOT %inner = f32[8]{{0:T(256)}} add(%p.0, %p.0), {cost(1_000_000)}
}}

%cold (p.1: f32[8]) -> f32[8] {{
  %p.1 = f32[8]{{0:T(256)}} parameter(0)
  ROOT %slow = f32[8]{{0:T(256)}} multiply(%p.1, %p.1), {cost(4000)}
}}

%warm (p.2: f32[8]) -> f32[8] {{
  ROOT %p.2 = f32[8]{{0:T(256)}} parameter(0)
}}

%helper (p.3: f32[8]) -> f32[8] {{
  %p.3 = f32[8]{{0:T(256)}} parameter(0)
  ROOT %helped = f32[8]{{0:T(256)}} negate(%p.3), {cost(7)}
}}

%body (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p.4 = (s32[]{{:T(128)}}, /*index=1*/f32[8]{{0:T(256)}}) parameter(0)
  %at = s32[]{{:T(128)}} get-tuple-element(%p.4), index=0
  %x = f32[8]{{0:T(256)}} get-tuple-element(%p.4), index=1
  %fusion.1 = f32[8]{{0:T(256)}} fusion(%x), kind=kLoop, calls=%fused, metadata={{op_name="jit(f)/add"}}, {cost(100)}
  %cond.1 = f32[8]{{0:T(256)}} conditional(%at, %fusion.1, %fusion.1), branch_computations={{%warm, %cold}}
  ROOT %next = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) tuple(%at, %cond.1)
}}

%condition (p.5: (s32[], f32[8])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(5)
  %p.5 = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) parameter(0)
  %count = s32[]{{:T(128)}} get-tuple-element(%p.5), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%count, %bound), direction=LT
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0:T(256)}} parameter(0)
  %copy-start = (f32[8]{{0:T(256)}}, f32[8]{{0:T(256)S(1)}}, u32[]{{:S(2)}}) copy-start(%x.1)
  %loop = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}) while(%start), condition=%condition, body=%body
  %called = f32[8]{{0:T(256)}} call(%x.1), to_apply=%helper
  %rows = f32[32,192]{{1,0:T(8,128)}} fusion(%t, %i), kind=kCustom, calls=%g, metadata={{op_name="jit(f)/gather"}}
  %elements = f32[32]{{0:T(256)}} fusion(%t, %i), kind=kCustom, calls=%g, metadata={{op_name="jit(f)/gather"}}
  %sort = (s32[8,256]{{1,0}}, f32[8,256]{{1,0}}) sort(%k, %v), dimensions={{1}}, to_apply=%less
  ROOT %out = f32[8]{{0:T(256)}} get-tuple-element(%loop), index=1
}}
"""


def test_loops_count_trips_branches_count_shares_and_fusions_count_once() -> None:
    asked = []

    def shares(branches: int, times: float) -> list[float]:
        asked.append((branches, times))
        return [0.75, 0.25]

    rows = counted(PROGRAM, shares)
    assert asked == [(2, 5.0)]
    assert sum(row.estimated for row in rows) == 5 * (100 + 0.25 * 4000) + 7
    times = {row.operation.name: row.times for row in rows if row.estimated}
    assert times == {"fusion.1": 5, "slow": 1.25, "helped": 1}


def test_more_trips_cost_more() -> None:
    few, many = (
        sum(row.estimated for row in counted(PROGRAM.replace("constant(5)", f"constant({trips})"), lambda *_: [1, 0]))
        for trips in (5, 6)
    )
    assert many == few + 100


def test_gathers_and_sorts_are_charged() -> None:
    charged = {row.operation.name: row.charged for row in counted(PROGRAM, lambda *_: [1, 0]) if row.charged}
    network = 8 * 9 / 2  # steps that sort 256 values
    assert charged == {
        "rows": 32 * GATHERED_ROW,
        "elements": 32 * GATHERED_ELEMENT,
        "sort": pytest.approx(2 * 2 * network * SORTED_TILE),
    }


def test_a_loop_without_a_constant_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="a loop does not count up to a constant"):
        counted(PROGRAM.replace("constant(5)", "parameter(1)"), lambda *_: [1, 0])
    with pytest.raises(ValueError, match="the text has no ENTRY computation"):
        counted("module @jit_f {}", lambda *_: [1, 0])
