// Python's view of the CPU kernels: NumPy arrays in, NumPy arrays out. Types, shapes and contiguity are checked
// here, so that a wrong call is an exception and never a wrong address; what values mean is checked in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "loader_bindings.h"
#include "text_bindings.h"

namespace py = pybind11;
namespace ms = megatron_speech;

namespace {

// Raised together with INTERFACE in megatron_speech/ops/extension.py whenever a signature changes.
constexpr int kInterface = 7;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void require_size(const Array<T>& array, int64_t size, const char* name) {
    if (array.size() != size) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " elements, needs " +
                                    std::to_string(size));
    }
}

template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owner = new std::vector<T>(std::move(values));
    py::capsule release(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owner->size()), owner->data(), release);
}

ms::LossMaskProblem problem_of(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths,
                               const Array<int32_t>& row_pointers, const Array<int32_t>& document_groups,
                               const Array<uint8_t>& document_flags, const Array<uint8_t>& modality_table,
                               int64_t prompt_end_id, int64_t text_prompt_end_id, const Array<float>& weights, Array<int64_t>& labels, Array<float>& loss_weights, Array<int64_t>& position_ids,
                               Array<int32_t>& group_ids, Array<int32_t>& cu_seqlens, Array<int64_t>& counts,
                               Array<int64_t>& invalid) {
    const bool grid = tokens.ndim() == 3;
    if ((tokens.ndim() != 2 && !grid) || tokens.shape(1) < 2 || (grid && tokens.shape(2) < 1)) {
        throw std::invalid_argument("tokens is not [B, S + 1] or [B, S + 1, K] with S >= 1 and K >= 1");
    }
    const int64_t rows = tokens.shape(0), seq_length = tokens.shape(1) - 1, streams = grid ? tokens.shape(2) : 1;
    const int64_t documents = document_lengths.size(), elements = rows * seq_length * streams;
    if (seq_length > ms::kMaxSeqLength / streams || elements > INT32_MAX) {
        throw std::invalid_argument("the batch has more elements than int32 can number");
    }
    if (modality_table.size() < 1) throw std::invalid_argument("modality_table is empty");
    require_size(row_pointers, rows + 1, "row_pointers");
    require_size(document_groups, documents, "document_groups");
    if (document_flags.size()) require_size(document_flags, documents, "document_flags");
    require_size(weights, 2 * ms::kModalities, "weights");
    require_size(labels, elements, "labels");
    require_size(loss_weights, elements, "loss_weights");
    require_size(position_ids, rows * seq_length, "position_ids");
    require_size(group_ids, elements, "group_ids");
    require_size(cu_seqlens, documents + rows + 1, "cu_seqlens");
    require_size(counts, ms::kCounts, "counts");
    require_size(invalid, 1, "invalid");
    ms::LossMaskProblem p{};
    p.tokens = tokens.data();
    p.document_lengths = document_lengths.data();
    p.row_pointers = row_pointers.data();
    p.document_groups = document_groups.data();
    p.document_flags = document_flags.size() ? document_flags.data() : nullptr;
    p.modality_table = modality_table.data();
    p.rows = rows;
    p.seq_length = seq_length;
    p.streams = streams;
    p.documents = documents;
    p.vocabulary = modality_table.size();
    p.prompt_end_id = prompt_end_id;
    p.text_prompt_end_id = text_prompt_end_id;
    for (int i = 0; i < 2 * ms::kModalities; ++i) p.weights[i] = weights.data()[i];
    p.labels = labels.mutable_data();
    p.loss_weights = loss_weights.mutable_data();
    p.position_ids = position_ids.mutable_data();
    p.group_ids = group_ids.mutable_data();
    p.cu_seqlens = cu_seqlens.mutable_data();
    p.counts = counts.mutable_data();
    p.invalid = invalid.mutable_data();
    return p;
}

bool loss_mask(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths, const Array<int32_t>& row_pointers,
               const Array<int32_t>& document_groups, const Array<uint8_t>& document_flags,
               const Array<uint8_t>& modality_table, int64_t prompt_end_id, int64_t text_prompt_end_id, const Array<float>& weights,
               Array<int64_t> labels, Array<float> loss_weights, Array<int64_t> position_ids, Array<int32_t> group_ids, Array<int32_t> cu_seqlens, Array<int64_t> counts,
               Array<int64_t> invalid) {
    const auto p = problem_of(tokens, document_lengths, row_pointers, document_groups, document_flags, modality_table,
                              prompt_end_id, text_prompt_end_id, weights, labels, loss_weights, position_ids, group_ids, cu_seqlens, counts,
                              invalid);
    // The row pointers are what a wrong address could come from.
    if (p.row_pointers[0] != 0 || p.row_pointers[p.rows] != p.documents) {
        throw std::invalid_argument("row_pointers do not run from 0 to the number of documents");
    }
    for (int64_t row = 0; row < p.rows; ++row) {
        if (p.row_pointers[row] > p.row_pointers[row + 1]) throw std::invalid_argument("row_pointers decrease");
    }
    for (int64_t d = 0; d < p.documents; ++d) {
        if (p.document_lengths[d] < 0) throw std::invalid_argument("a document length is negative");
    }
    py::gil_scoped_release release;
    return ms::loss_mask_cpu(p);
}

void loss_mask_emulated(const Array<int64_t>& tokens, const Array<int32_t>& document_lengths,
                        const Array<int32_t>& row_pointers, const Array<int32_t>& document_groups,
                        const Array<uint8_t>& document_flags, const Array<uint8_t>& modality_table,
                        int64_t prompt_end_id, int64_t text_prompt_end_id, const Array<float>& weights, Array<int64_t> labels, Array<float> loss_weights, Array<int64_t> position_ids,
                        Array<int32_t> group_ids, Array<int32_t> cu_seqlens, Array<int64_t> counts,
                        Array<int64_t> invalid, int threads, bool reversed) {
    const auto p = problem_of(tokens, document_lengths, row_pointers, document_groups, document_flags, modality_table,
                              prompt_end_id, text_prompt_end_id, weights, labels, loss_weights, position_ids, group_ids, cu_seqlens, counts,
                              invalid);
    py::gil_scoped_release release;
    ms::loss_mask_emulated(p, threads, reversed);
}

py::tuple pack_cut(const Array<int32_t>& lengths, int64_t seq_length) {
    if (seq_length < 1) throw std::invalid_argument("seq_length is below 1");
    ms::PackedSegments packed;
    {
        py::gil_scoped_release release;
        packed = ms::pack_cut(lengths.data(), lengths.size(), seq_length);
    }
    return py::make_tuple(to_numpy(std::move(packed.seq_ptr)), to_numpy(std::move(packed.position)),
                          to_numpy(std::move(packed.start)), to_numpy(std::move(packed.length)));
}

py::tuple pack_fit(const Array<int32_t>& lengths, int64_t seq_length, int64_t open_bins) {
    if (seq_length < 1 || open_bins < 1) throw std::invalid_argument("seq_length or open_bins is below 1");
    ms::PackedSegments packed;
    std::vector<int64_t> oversize;
    {
        py::gil_scoped_release release;
        packed = ms::pack_fit(lengths.data(), lengths.size(), seq_length, open_bins, &oversize);
    }
    return py::make_tuple(to_numpy(std::move(packed.seq_ptr)), to_numpy(std::move(packed.position)),
                          to_numpy(std::move(packed.start)), to_numpy(std::move(packed.length)),
                          to_numpy(std::move(oversize)));
}

// A column of a dataset: one dimension, contiguous, perhaps not aligned (a mapped .idx has a header of 34 bytes).
template <typename T>
const void* column_of(const py::array& array, int64_t* size, const char* name) {
    if (!py::dtype::of<T>().is(array.dtype()) && !py::dtype::of<T>().equal(array.dtype())) {
        throw std::invalid_argument(std::string(name) + " has another dtype than its kind needs");
    }
    if (array.ndim() != 1 || (array.size() > 1 && array.strides(0) != static_cast<py::ssize_t>(sizeof(T)))) {
        throw std::invalid_argument(std::string(name) + " is not a contiguous row");
    }
    *size = array.size();
    return array.data();
}

void check_documents(const Array<int32_t>& documents, int64_t rows) {
    for (int64_t i = 0; i < documents.size(); ++i) {
        if (documents.data()[i] < 0 || documents.data()[i] >= rows) {
            throw std::invalid_argument("document " + std::to_string(documents.data()[i]) + " of a dataset of " +
                                        std::to_string(rows));
        }
    }
}

// Runs that `bounds` [runs + 1] cuts 0 … count - 1 into; none is empty.
int64_t runs_of(const Array<int64_t>& bounds, int64_t count) {
    const int64_t runs = bounds.size() - 1;
    const int64_t* at = bounds.data();
    if (runs < 1 || at[0] != 0 || at[runs] != count) throw std::invalid_argument("bounds do not run from 0 to the end");
    for (int64_t run = 0; run < runs; ++run) {
        if (at[run] >= at[run + 1]) throw std::invalid_argument("bounds do not ascend");
    }
    return runs;
}

// Keeps the arrays alive that the order reads.
class PyBlendOrder {
  public:
    explicit PyBlendOrder(const py::list& strata) : arrays_(strata), order_(read(arrays_)) {}

    py::tuple take(int64_t count) {
        if (count < 0) throw std::invalid_argument("count is negative");
        py::array_t<uint16_t> stratum(count);
        py::array_t<int32_t> document(count), length(count), counted(count);
        py::array_t<float> seconds(count);
        const ms::OrderedDocuments out{stratum.mutable_data(), document.mutable_data(), length.mutable_data(),
                                       counted.mutable_data(), seconds.mutable_data()};
        {
            py::gil_scoped_release release;
            order_.take(count, out);
        }
        return py::make_tuple(stratum, document, length, counted, seconds);
    }

  private:
    static std::vector<ms::StratumDocuments> read(const py::tuple& strata) {
        if (strata.empty() || strata.size() > 1 + UINT16_MAX) throw std::invalid_argument("strata: 1 to 65536");
        std::vector<ms::StratumDocuments> all;
        for (const auto& item : strata) {
            const auto row = item.cast<py::tuple>();
            if (row.size() != 11) throw std::invalid_argument("a stratum is described by 11 values");
            const auto documents = row[0].cast<Array<int32_t>>(), first = row[1].cast<Array<int32_t>>();
            if (documents.ptr() != row[0].ptr() || first.ptr() != row[1].ptr()) {
                throw std::invalid_argument("documents are not contiguous int32");
            }
            ms::StratumDocuments stratum{};
            int64_t rows, counted_rows, seconds_rows;
            stratum.documents = documents.data();
            stratum.count = documents.size();
            stratum.first_documents = first.data();
            stratum.first_count = first.size();
            stratum.first_epoch = row[2].cast<uint64_t>();
            stratum.lengths = column_of<int32_t>(row[3].cast<py::array>(), &rows, "lengths");
            stratum.counted = column_of<int32_t>(row[4].cast<py::array>(), &counted_rows, "counted");
            stratum.seconds = column_of<float>(row[5].cast<py::array>(), &seconds_rows, "seconds");
            stratum.share = row[6].cast<double>();
            stratum.key = row[7].cast<uint64_t>();
            if (stratum.count < 1) throw std::invalid_argument("a stratum has no document");
            if (!(stratum.share > 0)) throw std::invalid_argument("a share is not positive");
            if (counted_rows != rows || seconds_rows != rows) throw std::invalid_argument("columns differ in length");
            check_documents(documents, rows);
            check_documents(first, rows);
            stratum.window_shards = row[8].cast<int64_t>();
            const auto bounds = row[9].cast<Array<int64_t>>(), first_bounds = row[10].cast<Array<int64_t>>();
            if (bounds.ptr() != row[9].ptr() || first_bounds.ptr() != row[10].ptr()) {
                throw std::invalid_argument("bounds are not contiguous int64");
            }
            if (stratum.window_shards < 0) throw std::invalid_argument("window_shards is negative");
            if (stratum.window_shards) {
                stratum.bounds = {bounds.data(), runs_of(bounds, stratum.count)};
                if (stratum.first_count) stratum.first_bounds = {first_bounds.data(), runs_of(first_bounds, stratum.first_count)};
            }
            all.push_back(stratum);
        }
        return all;
    }

    py::tuple arrays_;
    ms::BlendOrder order_;
};

py::array_t<int32_t> permutation(int64_t count, uint64_t key, int64_t first, int64_t stop) {
    if (count < 1 || count > INT32_MAX || first < 0 || stop < first || stop > count) {
        throw std::invalid_argument("not a run of a permutation");
    }
    const ms::Permutation permute(count, key);
    py::array_t<int32_t> out(stop - first);
    auto* data = out.mutable_data();
    for (int64_t i = first; i < stop; ++i) data[i - first] = static_cast<int32_t>(permute(static_cast<uint64_t>(i)));
    return out;
}

py::array_t<int32_t> windowed_permutation(const Array<int64_t>& bounds, int64_t shards, uint64_t key, int64_t first,
                                          int64_t stop) {
    const int64_t count = bounds.size() ? bounds.data()[bounds.size() - 1] : 0;
    const ms::ShardBounds given{bounds.data(), runs_of(bounds, count)};
    if (shards < 1 || count > INT32_MAX || first < 0 || stop < first || stop > count) {
        throw std::invalid_argument("not a run of a windowed permutation");
    }
    ms::WindowedPermutation permute(given, shards, key);
    py::array_t<int32_t> out(stop - first);
    auto* data = out.mutable_data();
    for (int64_t i = first; i < stop; ++i) data[i - first] = static_cast<int32_t>(permute(i));
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of megatron_speech; use megatron_speech.ops and megatron_speech.data instead.";
    m.attr("interface") = kInterface;
    ms::register_loader(m);
    ms::register_text(m);
    const auto fixed = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("loss_mask", &loss_mask, fixed("tokens"), fixed("document_lengths"), fixed("row_pointers"),
          fixed("document_groups"), fixed("document_flags"), fixed("modality_table"), py::arg("prompt_end_id"), py::arg("text_prompt_end_id"),
          fixed("weights"), fixed("labels"), fixed("loss_weights"), fixed("position_ids"), fixed("group_ids"),
          fixed("cu_seqlens"), fixed("counts"), fixed("invalid"), "False when a token has no modality: the outputs are not to be used.");
    m.def("loss_mask_emulated", &loss_mask_emulated, fixed("tokens"), fixed("document_lengths"), fixed("row_pointers"),
          fixed("document_groups"), fixed("document_flags"), fixed("modality_table"), py::arg("prompt_end_id"), py::arg("text_prompt_end_id"),
          fixed("weights"), fixed("labels"), fixed("loss_weights"), fixed("position_ids"), fixed("group_ids"),
          fixed("cu_seqlens"), fixed("counts"), fixed("invalid"), py::arg("threads"), py::arg("reversed"),
          "The code of the CUDA kernels, run thread by thread; for tests.");
    m.def("pack_cut", &pack_cut, fixed("lengths"), py::arg("seq_length"), "(seq_ptr, position, start, length)");
    m.def("pack_fit", &pack_fit, fixed("lengths"), py::arg("seq_length"), py::arg("open_bins"),
          "(seq_ptr, position, start, length, oversize)");
    m.def("permutation", &permutation, py::arg("count"), py::arg("key"), py::arg("first"), py::arg("stop"),
          "Elements first … stop - 1 of a keyed permutation of 0 … count - 1.");
    m.def("windowed_permutation", &windowed_permutation, fixed("bounds"), py::arg("shards"), py::arg("key"),
          py::arg("first"), py::arg("stop"), "Elements first … stop - 1 of a permutation that is local to windows.");
    py::class_<PyBlendOrder>(m, "BlendOrder", "The endless order of the documents of some strata.")
        .def(py::init<const py::list&>(), py::arg("strata"),
             "Of each stratum: documents, first_documents, first_epoch, lengths, counted, seconds, share, key, "
             "window_shards, bounds, first_bounds.")
        .def("take", &PyBlendOrder::take, py::arg("count"), "(stratum, document, length, counted, seconds)");
}
