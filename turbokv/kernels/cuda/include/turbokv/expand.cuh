// SPDX-License-Identifier: Apache-2.0
// From codes in a tile to operands of tensor-core instructions; lies in decode/.
#ifndef TURBOKV_EXPAND_CUH_
#define TURBOKV_EXPAND_CUH_

#include "turbokv/decode/key_operand.cuh"
#include "turbokv/decode/tables.cuh"
#include "turbokv/decode/three_bits.cuh"
#include "turbokv/decode/value_operand.cuh"

#endif  // TURBOKV_EXPAND_CUH_
