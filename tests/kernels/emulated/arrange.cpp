#include "low_bit_arrange.cu"
extern "C" void launch(int blocks_x, const u16 *x, u16 *y, int tokens, int padded, int in) {
    run_grid(blocks_x, 1, 1, [=] { low_bit_arrange(x, y, tokens, padded, in); });
}
