"""PTX instructions for the parts of a Mosaic GPU kernel that Pallas has no operation for, to be used inside `inline_mgpu`.

The modules are the ISA's families of instructions; all their names are here.
"""

from pallas_kernels.hopper.ptx.arithmetic import (
    add_dot as add_dot,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    add_multiples as add_multiples,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    as_number as as_number,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    count_at_least as count_at_least,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    div_full as div_full,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    div_rn as div_rn,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    exp2 as exp2,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    fma as fma,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    larger_magnitudes as larger_magnitudes,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    leading_zeros as leading_zeros,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    log2 as log2,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    lowest_bit as lowest_bit,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    max_f32 as max_f32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    max_nan_f32 as max_nan_f32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    max_s32 as max_s32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    max_u32 as max_u32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    maxnum_f32 as maxnum_f32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    min_s32 as min_s32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    min_u32 as min_u32,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    number_or_lowest as number_or_lowest,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    population as population,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    rcp as rcp,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    rsqrt as rsqrt,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    select as select,
)
from pallas_kernels.hopper.ptx.arithmetic import (
    total as total,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier as barrier,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_aligned as barrier_aligned,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_any as barrier_any,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_arrive as barrier_arrive,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_arrive_after_copies as barrier_arrive_after_copies,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_init as barrier_init,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_init_done as barrier_init_done,
)
from pallas_kernels.hopper.ptx.barriers import (
    barrier_wait as barrier_wait,
)
from pallas_kernels.hopper.ptx.barriers import (
    block_barrier as block_barrier,
)
from pallas_kernels.hopper.ptx.barriers import (
    cluster_barrier as cluster_barrier,
)
from pallas_kernels.hopper.ptx.barriers import (
    cluster_exit as cluster_exit,
)
from pallas_kernels.hopper.ptx.barriers import (
    grid_arrive as grid_arrive,
)
from pallas_kernels.hopper.ptx.barriers import (
    grid_wait as grid_wait,
)
from pallas_kernels.hopper.ptx.barriers import (
    proxy_fence as proxy_fence,
)
from pallas_kernels.hopper.ptx.control import (
    branch as branch,
)
from pallas_kernels.hopper.ptx.control import (
    choose as choose,
)
from pallas_kernels.hopper.ptx.control import (
    loop as loop,
)
from pallas_kernels.hopper.ptx.control import (
    repeat as repeat,
)
from pallas_kernels.hopper.ptx.control import (
    when as when,
)
from pallas_kernels.hopper.ptx.conversions import (
    bits_of as bits_of,
)
from pallas_kernels.hopper.ptx.conversions import (
    float16_from_e4m3 as float16_from_e4m3,
)
from pallas_kernels.hopper.ptx.conversions import (
    float16_pairs as float16_pairs,
)
from pallas_kernels.hopper.ptx.conversions import (
    float16_scale as float16_scale,
)
from pallas_kernels.hopper.ptx.conversions import (
    float_of as float_of,
)
from pallas_kernels.hopper.ptx.conversions import (
    from_bfloat16_pair as from_bfloat16_pair,
)
from pallas_kernels.hopper.ptx.conversions import (
    magnitude_bits as magnitude_bits,
)
from pallas_kernels.hopper.ptx.conversions import (
    rounded as rounded,
)
from pallas_kernels.hopper.ptx.conversions import (
    to_bfloat16_pair as to_bfloat16_pair,
)
from pallas_kernels.hopper.ptx.conversions import (
    to_e4m3_sum as to_e4m3_sum,
)
from pallas_kernels.hopper.ptx.conversions import (
    to_e4m3_word as to_e4m3_word,
)
from pallas_kernels.hopper.ptx.conversions import (
    to_float16_pair as to_float16_pair,
)
from pallas_kernels.hopper.ptx.copies import (
    copies_commit as copies_commit,
)
from pallas_kernels.hopper.ptx.copies import (
    copies_done as copies_done,
)
from pallas_kernels.hopper.ptx.copies import (
    copy_async as copy_async,
)
from pallas_kernels.hopper.ptx.copies import (
    copy_async_where as copy_async_where,
)
from pallas_kernels.hopper.ptx.copies import (
    copy_async_word as copy_async_word,
)
from pallas_kernels.hopper.ptx.copies import (
    prefetch as prefetch,
)
from pallas_kernels.hopper.ptx.copies import (
    prefetch_line as prefetch_line,
)
from pallas_kernels.hopper.ptx.ld_st import (
    append_at_least as append_at_least,
)
from pallas_kernels.hopper.ptx.ld_st import (
    global_address as global_address,
)
from pallas_kernels.hopper.ptx.ld_st import (
    increment_shared as increment_shared,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_fresh as load_fresh,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_fresh_pair as load_fresh_pair,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_fresh_words as load_fresh_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global as load_global,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global_float as load_global_float,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global_float_or_zero as load_global_float_or_zero,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global_floats_or_nan as load_global_floats_or_nan,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global_words as load_global_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_global_words_or_zeros as load_global_words_or_zeros,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_peer_float as load_peer_float,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_peer_words as load_peer_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared as load_shared,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared_float as load_shared_float,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared_floats as load_shared_floats,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared_pair as load_shared_pair,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared_short as load_shared_short,
)
from pallas_kernels.hopper.ptx.ld_st import (
    load_shared_words as load_shared_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    offset as offset,
)
from pallas_kernels.hopper.ptx.ld_st import (
    or_shared as or_shared,
)
from pallas_kernels.hopper.ptx.ld_st import (
    peer_address as peer_address,
)
from pallas_kernels.hopper.ptx.ld_st import (
    shared_address as shared_address,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_global as store_global,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_global_bfloat16 as store_global_bfloat16,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_global_words as store_global_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared as store_shared,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_floats as store_shared_floats,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_pair as store_shared_pair,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_products as store_shared_products,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_short as store_shared_short,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_words as store_shared_words,
)
from pallas_kernels.hopper.ptx.ld_st import (
    store_shared_zeros as store_shared_zeros,
)
from pallas_kernels.hopper.ptx.old_names import (
    above as above,
)
from pallas_kernels.hopper.ptx.old_names import (
    add as add,
)
from pallas_kernels.hopper.ptx.old_names import (
    approximate_inverse as approximate_inverse,
)
from pallas_kernels.hopper.ptx.old_names import (
    bit_and as bit_and,
)
from pallas_kernels.hopper.ptx.old_names import (
    bit_or as bit_or,
)
from pallas_kernels.hopper.ptx.old_names import (
    bit_xor as bit_xor,
)
from pallas_kernels.hopper.ptx.old_names import (
    both as both,
)
from pallas_kernels.hopper.ptx.old_names import (
    compare as compare,
)
from pallas_kernels.hopper.ptx.old_names import (
    div as div,
)
from pallas_kernels.hopper.ptx.old_names import (
    divide_as_xla as divide_as_xla,
)
from pallas_kernels.hopper.ptx.old_names import (
    divide_floats as divide_floats,
)
from pallas_kernels.hopper.ptx.old_names import (
    either as either,
)
from pallas_kernels.hopper.ptx.old_names import (
    inverse as inverse,
)
from pallas_kernels.hopper.ptx.old_names import (
    larger as larger,
)
from pallas_kernels.hopper.ptx.old_names import (
    load_float_or_zero as load_float_or_zero,
)
from pallas_kernels.hopper.ptx.old_names import (
    load_words as load_words,
)
from pallas_kernels.hopper.ptx.old_names import (
    load_words_or_zeros as load_words_or_zeros,
)
from pallas_kernels.hopper.ptx.old_names import (
    maximum as maximum,
)
from pallas_kernels.hopper.ptx.old_names import (
    maximum_floats as maximum_floats,
)
from pallas_kernels.hopper.ptx.old_names import (
    minimum as minimum,
)
from pallas_kernels.hopper.ptx.old_names import (
    minus as minus,
)
from pallas_kernels.hopper.ptx.old_names import (
    mul as mul,
)
from pallas_kernels.hopper.ptx.old_names import (
    plus as plus,
)
from pallas_kernels.hopper.ptx.old_names import (
    rem as rem,
)
from pallas_kernels.hopper.ptx.old_names import (
    shift_left as shift_left,
)
from pallas_kernels.hopper.ptx.old_names import (
    shift_right as shift_right,
)
from pallas_kernels.hopper.ptx.old_names import (
    sub as sub,
)
from pallas_kernels.hopper.ptx.old_names import (
    times as times,
)
from pallas_kernels.hopper.ptx.old_names import (
    times_plus as times_plus,
)
from pallas_kernels.hopper.ptx.registers import (
    Address as Address,
)
from pallas_kernels.hopper.ptx.registers import (
    Float as Float,
)
from pallas_kernels.hopper.ptx.registers import (
    Predicate as Predicate,
)
from pallas_kernels.hopper.ptx.registers import (
    Signed as Signed,
)
from pallas_kernels.hopper.ptx.registers import (
    Value as Value,
)
from pallas_kernels.hopper.ptx.registers import (
    Word as Word,
)
from pallas_kernels.hopper.ptx.registers import (
    as_float as as_float,
)
from pallas_kernels.hopper.ptx.registers import (
    as_value as as_value,
)
from pallas_kernels.hopper.ptx.registers import (
    asm as asm,
)
from pallas_kernels.hopper.ptx.registers import (
    constant as constant,
)
from pallas_kernels.hopper.ptx.registers import (
    f32 as f32,
)
from pallas_kernels.hopper.ptx.registers import (
    i32 as i32,
)
from pallas_kernels.hopper.ptx.registers import (
    i64 as i64,
)
from pallas_kernels.hopper.ptx.registers import (
    number as number,
)
from pallas_kernels.hopper.ptx.registers import (
    opaque as opaque,
)
from pallas_kernels.hopper.ptx.registers import (
    scalar as scalar,
)
from pallas_kernels.hopper.ptx.registers import (
    typed as typed,
)
from pallas_kernels.hopper.ptx.warp import (
    alike_in_warp as alike_in_warp,
)
from pallas_kernels.hopper.ptx.warp import (
    ballot as ballot,
)
from pallas_kernels.hopper.ptx.warp import (
    cluster_rank as cluster_rank,
)
from pallas_kernels.hopper.ptx.warp import (
    from_lane as from_lane,
)
from pallas_kernels.hopper.ptx.warp import (
    lane_distant as lane_distant,
)
from pallas_kernels.hopper.ptx.warp import (
    reduce_warp as reduce_warp,
)
from pallas_kernels.hopper.ptx.warp import (
    sum_of_lanes_below as sum_of_lanes_below,
)
from pallas_kernels.hopper.ptx.warp import (
    sum_of_lanes_up_to as sum_of_lanes_up_to,
)
from pallas_kernels.hopper.ptx.warp import (
    sum_of_warp as sum_of_warp,
)
from pallas_kernels.hopper.ptx.warp import (
    thread as thread,
)
from pallas_kernels.hopper.ptx.warp import (
    transposed_among_lanes as transposed_among_lanes,
)
from pallas_kernels.hopper.ptx.warp import (
    uniform as uniform,
)
from pallas_kernels.hopper.ptx.wgmma import (
    add_products as add_products,
)
from pallas_kernels.hopper.ptx.wgmma import (
    load_shared_transposed as load_shared_transposed,
)
from pallas_kernels.hopper.ptx.wgmma import (
    matrix as matrix,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiplied as multiplied,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiply as multiply,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiply_codes as multiply_codes,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiply_commit as multiply_commit,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiply_fragments as multiply_fragments,
)
from pallas_kernels.hopper.ptx.wgmma import (
    multiply_wait as multiply_wait,
)
from pallas_kernels.hopper.ptx.wgmma import (
    products_of_codes as products_of_codes,
)
from pallas_kernels.hopper.ptx.wgmma import (
    store_shared_transposed as store_shared_transposed,
)
from pallas_kernels.hopper.ptx.wgmma import (
    transposed_block as transposed_block,
)
