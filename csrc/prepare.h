// Preparation of boxes, shared by the CPU and the CUDA library: a row of numbers for each box, checked once.
//
//   row = (image, x1, y1, x2, y2, w_1 .. w_L)      w_l = factor * box weight * level weight
//
// All later steps read these rows and nothing else of boxes, weights or the level rule. A box that is not finite, that
// is inverted, or whose image does not exist gets image -1 and zeros: every later step skips it in the same way.
#pragma once

#include <cstring>
#include <vector>

#include "geometry.h"

namespace rakd {

// dtypes that boxes and weights may have.
enum class Number : int32_t { kFloat, kDouble, kHalf, kBFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

RAKD_HD double float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return static_cast<double>(value);
}

RAKD_HD double half_to_double(uint16_t bits) {
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? float_from_bits(0x7fc00000u) : sign * static_cast<double>(INFINITY);
  if (exponent == 0) return sign * ldexp(static_cast<double>(fraction), -24);
  return sign * ldexp(static_cast<double>(1024 + fraction), exponent - 25);
}

RAKD_HD double number_at(const void* data, Number type, int64_t i) {
  switch (type) {
    case Number::kFloat:
      return static_cast<double>(static_cast<const float*>(data)[i]);
    case Number::kDouble:
      return static_cast<const double*>(data)[i];
    case Number::kHalf:
      return half_to_double(static_cast<const uint16_t*>(data)[i]);
    case Number::kBFloat16:
      return float_from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
    case Number::kUInt8:
      return static_cast<double>(static_cast<const uint8_t*>(data)[i]);
    case Number::kInt8:
      return static_cast<double>(static_cast<const int8_t*>(data)[i]);
    case Number::kInt16:
      return static_cast<double>(static_cast<const int16_t*>(data)[i]);
    case Number::kInt32:
      return static_cast<double>(static_cast<const int32_t*>(data)[i]);
    default:
      return static_cast<double>(static_cast<const int64_t*>(data)[i]);
  }
}

// Numbers [n] or [n, m] as the caller has them; strides in elements. data == nullptr: not given.
struct Numbers {
  const void* data = nullptr;
  Number type = Number::kFloat;
  int64_t stride[2] = {0, 0};

  RAKD_HD double at(int64_t i, int64_t j) const { return number_at(data, type, i * stride[0] + j * stride[1]); }
};

// A call's boxes as the caller has them: one [K, 5], or a list [K_b, 4] for each image.
struct BoxLists {
  bool whole = false;
  std::vector<Numbers> list;
  std::vector<int64_t> count;  // boxes of each
  int64_t total = 0;           // of them
};

// What the rows of a call are made from, beside the boxes.
struct Preparation {
  int64_t images;  // boxes of other images count nothing
  int32_t levels;
  LevelRule rule;
  double level_of[kMaxLevels];  // log2 of the strides, increasing
  Numbers box_weights;          // [K]; not given: 1
  Numbers level_weights;        // [K, levels]; not given: by the rule
  double factor;                // of all weights
};

enum class Fault : int32_t { kNone, kNotFinite, kBatchIndex, kTurned, kBoxWeight, kLevelWeight };

RAKD_HD bool is_finite_number(double value) { return value - value == 0.0; }

RAKD_HD Fault box_fault(const Preparation& call, const double* box) {
  for (int i = 0; i < 5; ++i) {
    if (!is_finite_number(box[i])) return Fault::kNotFinite;
  }
  if (!(box[0] >= 0.0 && box[0] < static_cast<double>(call.images) && box[0] == floor(box[0]))) {
    return Fault::kBatchIndex;
  }
  return box[1] <= box[3] && box[2] <= box[4] ? Fault::kNone : Fault::kTurned;
}

// Fills row[0 .. 5 + levels) of box number k from box = (image, x1, y1, x2, y2). A weight that is not finite counts
// zero, as does a negative level weight; the fault is returned for callers that can raise it.
RAKD_HD Fault prepare_row(const Preparation& call, const double* box, int64_t k, double* row) {
  double* weights = row + 5;
  Fault fault = box_fault(call, box);
  row[0] = -1.0;
  for (int i = 1; i < 5; ++i) row[i] = 0.0;
  for (int32_t l = 0; l < call.levels; ++l) weights[l] = 0.0;
  if (fault != Fault::kNone) return fault;
  for (int i = 0; i < 5; ++i) row[i] = box[i];
  double coefficient = call.factor;
  if (call.box_weights.data) {
    const double weight = call.box_weights.at(k, 0);
    if (!is_finite_number(weight)) return Fault::kBoxWeight;
    coefficient = mul(coefficient, weight);
  }
  if (call.level_weights.data) {
    for (int32_t l = 0; l < call.levels; ++l) {
      const double weight = call.level_weights.at(k, l);
      const bool good = weight >= 0.0 && is_finite_number(weight);
      weights[l] = good ? weight : 0.0;
      if (!good) fault = Fault::kLevelWeight;
    }
  } else {
    level_weights(box[3] - box[1], box[4] - box[2], call.level_of, call.levels, call.rule, weights);
  }
  for (int32_t l = 0; l < call.levels; ++l) weights[l] = mul(coefficient, weights[l]);
  return fault;
}

}  // namespace rakd
