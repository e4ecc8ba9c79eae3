// The inner loops whose bits are promised, without contraction; CMakeLists.txt compiles this file once for each
// instruction set.
#include "rows.hpp"

#include "quantise_rows.hpp"
#include "step_rows.hpp"

#define TINTYPE_STRING(name) #name
#define TINTYPE_NAME(name) TINTYPE_STRING(name)

namespace tintype {
namespace TINTYPE_SIMD {

extern const Rows rows = {TINTYPE_NAME(TINTYPE_SIMD), &norm_rows, int8_row, int4_row, step};

}  // namespace TINTYPE_SIMD
}  // namespace tintype
