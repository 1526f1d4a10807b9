#include "low_bit_linear.cu"
extern "C" void launch(int blocks_x, int blocks_y, int blocks_z, const uint4 *words, const u32 *scale, const u16 *x,
                       const u16 *bias, const u16 *residual, u16 *y, int tokens, int tiles, int in) {
    run_grid(blocks_x, blocks_y, blocks_z,
             [=] { low_bit_linear(words, scale, x, bias, residual, y, tokens, tiles, in); });
}
