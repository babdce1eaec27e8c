// CPU ops prepare_boxes and level_weights: boxes and weights of any real dtype become the rows and the index that all
// other ops read, in one pass.
#include "tensors.h"

namespace rakd {
namespace {

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

// Calls f(k, box) for box number k = 0 .. total - 1, box = (image, x1, y1, x2, y2).
template <class F>
void for_each_box(const BoxLists& boxes, const F& f) {
  const int64_t columns = boxes.whole ? 5 : 4;
  int64_t k = 0;
  for (size_t b = 0; b < boxes.list.size(); ++b) {
    for (int64_t i = 0; i < boxes.count[b]; ++i, ++k) {
      double box[5] = {static_cast<double>(b)};
      for (int64_t j = 0; j < columns; ++j) box[5 - columns + j] = boxes.list[b].at(i, j);
      f(k, box);
    }
  }
}

std::tuple<Tensor, Tensor> prepare_boxes(Tensors boxes, std::optional<Tensor> box_weights,
                                         std::optional<Tensor> level_weights, int64_t images, bool mean,
                                         DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                                         double canonical_level) {
  BoxArguments given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  given.add(boxes[0], box_weights, level_weights, images, mean);
  const int64_t count = given.boxes.total, width = 5 + given.preparation.levels;
  Tensor rows = empty_tensor(ScalarType::Double, {count, width});
  Tensor index = empty_tensor(ScalarType::Int, {images + 1 + count});
  auto* row = static_cast<double*>(rows.data_ptr());
  auto* begin = static_cast<int32_t*>(index.data_ptr());
  std::fill_n(begin, images + 1, 0);
  for_each_box(given.boxes, [&](int64_t k, const double* box) {
    checked_row(given.preparation, box, k, row);
    ++begin[static_cast<int64_t>(row[0])];
    row += width;
  });
  // A stable counting sort: sums of counts are where images end; filled from the last box on, they become the
  // beginnings.
  for (int64_t b = 0; b < images; ++b) begin[b + 1] += begin[b];
  int32_t* order = begin + images + 1;
  for (int64_t k = count - 1; k >= 0; --k) {
    row -= width;
    order[--begin[static_cast<int64_t>(row[0])]] = static_cast<int32_t>(k);
  }
  return {rows, index};
}

// [K, L], for boxes of any number of images.
Tensor level_weights_of(Tensors boxes, DoubleList strides, int64_t assignment, double sigma, double canonical_size,
                        double canonical_level) {
  const BoxArguments given(boxes, strides, assignment, sigma, canonical_size, canonical_level);
  const int64_t levels = given.preparation.levels;
  DoubleList weights(given.boxes.total * levels);
  for_each_box(given.boxes, [&](int64_t k, const double* box) {
    double row[5 + kMaxLevels];
    checked_row(given.preparation, box, k, row);
    std::copy_n(row + 5, levels, weights.data() + k * levels);
  });
  const bool wide = boxes[0].scalar_type() == ScalarType::Double;
  return tensor_of(wide ? ScalarType::Double : ScalarType::Float, {given.boxes.total, levels}, weights.data());
}

}  // namespace
}  // namespace rakd

STABLE_TORCH_LIBRARY_IMPL(rakd_ops, CPU, m) {
  m.impl("prepare_boxes", TORCH_BOX(&rakd::prepare_boxes));
  m.impl("level_weights", TORCH_BOX(&rakd::level_weights_of));
}
