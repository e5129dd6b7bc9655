// The operators' `rates` and `options`, checked and turned into the structs of common/params.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/params.h"
#include "tensors.h"

namespace fusedreg::stable {

inline void check_option_counts(const char* name, const std::vector<double>& rates,
                                const std::vector<int64_t>& options) {
  if (rates.size() == kNumberOfRates && options.size() == kNumberOfOptions) return;
  fail(name, ": expected ", kNumberOfRates, " rates and ", kNumberOfOptions, " options, got ", rates.size(), " and ",
       options.size(), "; the Python files and the built extension are of different versions: build it again");
}

inline Rates decode_rates(const char* name, const std::vector<double>& rates) {
  for (const double rate : rates) {
    if (!(rate >= 0.0 && rate < 1.0)) fail(name, ": rates: expected numbers in [0, 1), got ", rate);
  }
  return {rates[0], rates[1], rates[2], rates[3], rates[4], rates[5], rates[6], rates[7], rates[8]};
}

inline Options decode_options(const char* name, const std::vector<int64_t>& values) {
  const auto limit = [&](int index, int64_t end) {
    const int64_t value = values[index];
    if (value < 0 || value >= end) fail(name, ": options[", index, "]: expected 0 <= value < ", end, ", got ", value);
    return static_cast<int32_t>(value);
  };
  const auto flag = [&limit](int index) { return limit(index, 2) == 1; };
  Options options;
  options.layer = limit(0, int64_t{1} << 30);  // layer * 2 + direction is a 32-bit word of the masks' counter
  options.reverse = flag(1);
  options.training = flag(2);
  options.untied_masks = flag(3);
  options.update_mask_sequence = flag(4);
  options.weight_mask_row = flag(5);
  options.zoneout_candidate = flag(6);
  options.norm = static_cast<NormKind>(limit(7, 3));
  options.norm_input = flag(8);
  options.norm_recurrent = flag(9);
  options.norm_cell = flag(10);
  options.norm_input_sequence = flag(11);
  // Flags of a norm that is off mean nothing, and nothing may depend on them.
  if (options.norm == NormKind::None) options.norm_input = options.norm_recurrent = options.norm_cell = false;
  if (options.norm != NormKind::Batch) options.norm_input_sequence = false;
  options.return_cells = flag(12);
  options.save = static_cast<Save>(limit(13, 3));
  options.gradient_groups = std::max(1, limit(14, int64_t{1} << 31));
  return options;
}

}  // namespace fusedreg::stable
