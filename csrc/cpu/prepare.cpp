// CPU ops prepare_boxes and level_weights: boxes and weights of any real dtype become the rows and the index that all
// other ops read, in one pass.
#include <cmath>
#include <limits>
#include <optional>

#include "tensors.h"

namespace rakd {
namespace {

// Boxes as the caller has them: one tensor [K, 5], or one [K_b, 4] for each image.
struct BoxList {
  explicit BoxList(const Tensors& tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "boxes: expected at least one tensor");
    columns = tensors.size() == 1 && tensors[0].dim() == 2 && tensors[0].size(1) == 5 ? 5 : 4;
    for (const Tensor& t : tensors) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns,
                      "boxes: expected one tensor [K, 5] or one [K, 4] per image, got another shape");
      groups.push_back(numbers(t, "boxes"));
      counts.push_back(t.size(0));
      count += t.size(0);
    }
    STD_TORCH_CHECK(count <= kMaxCells, "boxes: expected fewer than 2^31 - 1, got ", count);
  }

  // Calls f(k, box) for box number k = 0 .. count - 1, box = (image, x1, y1, x2, y2).
  template <class F>
  void for_each(const F& f) const {
    int64_t k = 0;
    for (size_t b = 0; b < groups.size(); ++b) {
      for (int64_t i = 0; i < counts[b]; ++i, ++k) {
        double box[5] = {static_cast<double>(b)};
        for (int64_t j = 0; j < columns; ++j) box[5 - columns + j] = groups[b].at(i, j);
        f(k, box);
      }
    }
  }

  int64_t count = 0, columns;
  std::vector<Numbers> groups;
  std::vector<int64_t> counts;  // [groups] boxes
};

Preparation preparation(int64_t images, const DoubleList& strides, int64_t assignment, double sigma,
                        double canonical_size, double canonical_level) {
  STD_TORCH_CHECK(!strides.empty() && strides.size() <= kMaxLevels, "strides: expected 1 to ", kMaxLevels,
                  " numbers, got ", strides.size());
  STD_TORCH_CHECK(assignment >= 0 && assignment <= 2, "assignment: expected 0, 1 or 2, got ", assignment);
  STD_TORCH_CHECK(sigma > 0.0 && canonical_size > 0.0, "sigma, canonical_size: expected positive numbers, got ", sigma,
                  " and ", canonical_size);
  Preparation call{};
  call.images = images;
  call.levels = static_cast<int32_t>(strides.size());
  call.rule = LevelRule{static_cast<Assignment>(assignment), sigma, canonical_size, canonical_level};
  call.factor = 1.0;
  for (size_t l = 0; l < strides.size(); ++l) {
    STD_TORCH_CHECK(strides[l] > (l == 0 ? 0.0 : strides[l - 1]),
                    "strides: expected positive, increasing numbers, got ", strides[l], " in place ", l);
    call.level_of[l] = std::log2(strides[l]);
  }
  return call;
}

// Fills the row of box number k; a fault is an error.
void checked_row(const Preparation& call, const double* box, int64_t k, double* row) {
  constexpr const char* kExpected[] = {"",
                                       "boxes: expected finite numbers",
                                       "boxes: expected whole batch indices of the call's images",
                                       "boxes: expected x1 <= x2 and y1 <= y2",
                                       "box_weights: expected finite numbers",
                                       "level_weights: expected finite numbers of at least 0"};
  const Fault fault = prepare_row(call, box, k, row);
  STD_TORCH_CHECK(fault == Fault::kNone, kExpected[static_cast<int>(fault)], ", got others in row ", k,
                  ", whose box is (", box[1], ", ", box[2], ", ", box[3], ", ", box[4], ") of image ", box[0]);
}

std::tuple<Tensor, Tensor> prepare_boxes(Tensors tensors, std::optional<Tensor> box_weights,
                                         std::optional<Tensor> level_weights, int64_t images, bool mean,
                                         DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                                         double canonical_level) {
  Preparation call = preparation(images, strides, assignment, sigma, canonical_size, canonical_level);
  const BoxList boxes(tensors);
  STD_TORCH_CHECK(images >= 0 && images <= kMaxCells, "images: expected a number from 0 to 2^31 - 2, got ", images);
  STD_TORCH_CHECK(boxes.columns == 5 || static_cast<int64_t>(tensors.size()) == images, "boxes: expected ", images,
                  " tensors, one per image, got ", tensors.size());
  if (mean && boxes.count > 0) call.factor = 1.0 / static_cast<double>(boxes.count);
  if (box_weights) {
    STD_TORCH_CHECK(box_weights->dim() == 1 && box_weights->size(0) == boxes.count, "box_weights: expected shape [",
                    boxes.count, "], one per box");
    call.box_weights = numbers(*box_weights, "box_weights");
  }
  if (level_weights) {
    STD_TORCH_CHECK(
        level_weights->dim() == 2 && level_weights->size(0) == boxes.count && level_weights->size(1) == call.levels,
        "level_weights: expected shape [", boxes.count, ", ", call.levels, "], one per box and level");
    call.level_weights = numbers(*level_weights, "level_weights");
  }
  Tensor rows = empty_tensor(ScalarType::Double, {boxes.count, 5 + call.levels});
  Tensor index = empty_tensor(ScalarType::Int, {images + 1 + boxes.count});
  auto* row = static_cast<double*>(rows.data_ptr());
  auto* begin = static_cast<int32_t*>(index.data_ptr());
  std::fill_n(begin, images + 1, 0);
  boxes.for_each([&](int64_t k, const double* box) {
    checked_row(call, box, k, row);
    ++begin[static_cast<int64_t>(row[0])];
    row += 5 + call.levels;
  });
  // A stable counting sort: sums of counts are where images end; filled from the last box on, they become the
  // beginnings.
  for (int64_t b = 0; b < images; ++b) begin[b + 1] += begin[b];
  int32_t* order = begin + images + 1;
  for (int64_t k = boxes.count - 1; k >= 0; --k) {
    row -= 5 + call.levels;
    order[--begin[static_cast<int64_t>(row[0])]] = static_cast<int32_t>(k);
  }
  return {rows, index};
}

// [K, L], for boxes of any number of images.
Tensor level_weights_of(Tensors tensors, DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                        double canonical_level) {
  const Preparation call =
      preparation(std::numeric_limits<int64_t>::max(), strides, assignment, sigma, canonical_size, canonical_level);
  const BoxList boxes(tensors);
  DoubleList weights(boxes.count * call.levels);
  boxes.for_each([&](int64_t k, const double* box) {
    double row[5 + kMaxLevels];
    checked_row(call, box, k, row);
    std::copy_n(row + 5, call.levels, weights.data() + k * call.levels);
  });
  const bool wide = tensors[0].scalar_type() == ScalarType::Double;
  return tensor_of(wide ? ScalarType::Double : ScalarType::Float, {boxes.count, call.levels}, weights.data());
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("prepare_boxes", TORCH_BOX(&rakd::prepare_boxes));
  m.impl("level_weights", TORCH_BOX(&rakd::level_weights_of));
}
