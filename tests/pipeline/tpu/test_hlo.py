"""What is read out of XLA's text of a program."""

import pytest

from pipeline.tpu import hlo

SUM = "to_apply=%region_0.0"


def program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\nENTRY %main.1 () -> f32[] {{\n{body}\n}}\n"


def collective(name, shape, op, scope, groups="{{0,1,2,3}}"):
    return f'%{name} = {shape} {op}(%x.1), replica_groups={groups}, {SUM}, metadata={{op_name="{scope}"}}'


def test_sums_that_the_compiler_merged_are_told_apart_by_what_they_were_before():
    lowered = program(
        collective("a", "f32[64]{0}", "all-reduce", "gradients/CrossReplicaSum"),
        collective("b", "f32[7]{0}", "all-reduce", "statistics/CrossReplicaSum"),
    )
    merged = "(f32[8,8]{1,0:T(8,128)S(1)}, f32[7]{0:T(128)})"
    (gradients, statistics) = hlo.collectives(
        lowered, program(collective("c", merged, "all-reduce", "gradients/CrossReplicaSum")), 4
    )
    assert (gradients.part, gradients.bytes) == ("gradients", 256)
    assert (statistics.part, statistics.bytes) == ("statistics", 28)


@pytest.mark.parametrize(
    ("shape", "op", "received"),
    [
        ("f32[100]{0}", "all-reduce", 600),  # 2 x 400 x 3 / 4
        ("bf16[100]{0}", "all-to-all", 150),
        ("u8[100]{0}", "all-gather", 75),
        ("f32[100]{0}", "reduce-scatter", 1200),  # 1600 bytes in, 400 out
        ("(f32[100]{0}, f32[100]{0}, u32[]{:S(2)})", "collective-permute-start", 400),
        ("(f32[25]{0}, f32[100]{0})", "all-gather-start", 300),
    ],
)
def test_a_core_receives_what_a_ring_brings_it(shape, op, received):
    text = program(collective("a", shape, op, "key_shuffle/AllToAll"))
    (found,) = hlo.collectives(text, text, 4)
    assert found.received == received
    assert found.part == "key_shuffle"


def test_a_ring_is_as_long_as_its_group():
    groups = "{{0,1},{2,3}}"
    text = program(collective("a", "f32[100]{0}", "all-reduce", "key_shuffle/CrossReplicaSum", groups))
    assert hlo.collectives(text, text, 4)[0].received == 400
    text = text.replace(groups, "[2,2]<=[4]")
    assert hlo.collectives(text, text, 4)[0].received == 400


@pytest.mark.parametrize(
    ("scope", "collective_", "part"),
    [
        ("key_encoder/conv1_1/convolution", False, "key_encoder"),
        ("gradient_tape/query_encoder/conv1_1/convolution", False, "backward"),
        ("gradients/CrossReplicaSum_3", True, "gradients"),
        ("statistics_1/CrossReplicaSum", True, "statistics"),
        ("query_encoder/bn1_1/batch_norm/CrossReplicaSum", True, "batch_norm"),
        ("gradient_tape/query_encoder/bn1_1/batch_norm/CrossReplicaSum", True, "batch_norm"),
        ("mul", False, ""),
        ("", False, ""),
    ],
)
def test_the_outermost_scope_is_the_part_of_the_algorithm(scope, collective_, part):
    assert hlo.part_of(scope, collective=collective_) == part


COPIED = (
    "%copy-start.1 = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%p.1)",
    "%fetched.1 = f32[1000]{0:S(1)} copy-done(%copy-start.1)",
)
SLICED = (
    "%slice-start.1 = (f32[1000]{0}, f32[250]{0:S(1)}, s32[]{:S(2)}) slice-start(%p.1)",
    "%slice-done.1 = f32[250]{0:S(1)} slice-done(%slice-start.1)",
    '%fetched.1 = f32[500]{0:S(1)} custom-call(%slice-done.1), custom_call_target="ConcatBitcast"',
)


@pytest.mark.parametrize(("fetch", "moved", "used"), [(COPIED, 4000, 4000), (SLICED, 1000, 2000)])
def test_bytes_go_to_the_part_that_uses_them_as_often_as_they_move_and_on_the_chip_they_are_no_traffic(
    fetch, moved, used
):
    result = '%fusion.1 = f32[500]{0} fusion(%fetched.1), kind=kLoop, metadata={op_name="sgd/mul"}'
    text = program("%p.1 = f32[1000]{0} parameter(0)", *fetch, result)
    assert hlo.bytes_by_part(text) == {"sgd": 2 * moved + used + 2000}
    assert hlo.bytes_by_part(text, hbm_only=True) == {"sgd": moved + 2000}


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ("bf16[32,56,56,64]{3,0,2,1:T(8,128)(2,1)}", 32 * 56 * 56 * 128 * 2),
        ("bf16[32,56,28,128]{3,0,2,1:T(8,128)(2,1)S(1)}", 32 * 56 * 56 * 64 * 2),
        ("u8[32,224,224,3]{0,2,1,3:T(32,128)(4,1)}", 128 * 224 * 224 * 3),
        ("f32[7]{0:T(128)}", 512),
        ("f32[10,3]{1,0}", 120),
        ("f32[]{:T(128)}", 4),
        ("pred[]", 1),
    ],
)
def test_what_is_kept_in_tiles_counts_with_their_padding(shape, kept):
    text = program(f'%a = {shape} fusion(), kind=kLoop, metadata={{op_name="sgd/mul"}}')
    assert hlo.bytes_by_part(text) == {"sgd": kept}


def test_the_compiler_s_own_cycles_are_summed_by_part_but_not_those_inside_of_what_is_called():
    def line(name, scope, cycles):
        estimate = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}","is_mask":false}}}}'
        return f'%{name} = f32[8]{{0}} fusion(%p.1), calls=%c.1, metadata={{op_name="{scope}"}}, {estimate}'

    called = "%c.1 (p: f32[8]) -> f32[8] {\n  " + line("inner", "sgd/sub", 7) + "\n}\n"
    text = program(line("a", "sgd/sub_1", 1800), line("b", "sgd/sub_2", 40), line("c", "loss/mul", 5), *SLICED)
    assert hlo.cycles_by_part(called + text) == {"loss": 5, "sgd": 1840}
