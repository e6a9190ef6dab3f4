"""What is read from the compiler's output, on code that can be counted by hand and on one small block."""

from dataclasses import replace

import torch

from bench.compiled import Compiled, compiled, counted_code, step_calls
from sana.config import VARIANTS

CODE = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['float*'], r'''
extern "C" void kernel(float* out_ptr0)
{
    {
        for(x0=0; x0<2; x0+=1)
        {
            {
            }
        }
    }
    {
        for(x0=0; x0<3; x0+=1)
    }
}
''')


cpp_fused_mul_1 = async_compile.cpp_pybinding(['float*'], r'''
{
    {
    }
}
''')

async_compile.wait(globals())

def call(self, args):
    cpp_fused_add_0(arg0_1, buf0)
    extern_kernels.mm(buf0, arg1_1, out=buf1)
    buf2 = extern_kernels.convolution(buf1, arg2_1)
    cpp_fused_mul_1(buf2)
    buf3 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf2)
    cpp_fused_add_0(buf2, buf4)
    return (buf4, )
"""


def test_loops_count_as_often_as_they_run() -> None:
    assert counted_code(CODE) == (2 + 1 + 2, 3)


def test_blocks_are_all_as_the_second() -> None:
    assert Compiled(0, 11, 14).of_blocks(28, Compiled(1, 20, 26)) == Compiled(27, 11 + 27 * 9, 14 + 27 * 12)


def test_a_block_is_one_graph_of_so_many_kernels() -> None:
    """Eight products, two of linear attention, attention to the text and a convolution; and a product at either end."""
    _, ours = step_calls(replace(VARIANTS["sana-0.6b-1024px"].transformer, depth=1))
    assert compiled(ours) == Compiled(0, 11, 14)


def test_a_break_is_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    run = torch.compile(broken)
    assert compiled(lambda: run(torch.ones(8))) == Compiled(1, 2, 0)
