// Python's view of the loader's kernels: what a batch is read with, and length buckets.
#include "loader_bindings.h"

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "bucketing.h"
#include "gather.h"

namespace py = pybind11;
namespace ms = megatron_speech;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
py::array_t<T> owned(std::vector<T>&& values) {
    auto* owner = new std::vector<T>(std::move(values));
    py::capsule release(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owner->size()), owner->data(), release);
}

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// The datasets of a run. Holds on to their arrays; called from several threads, since it never changes.
class TokenSources {
  public:
    // Each dataset is (ids [N], byte pointers int64 [D], lengths int32 [D] in steps, whether the ids are a mapped file);
    // a step is `streams` ids.
    TokenSources(const py::list& datasets, int64_t streams) : streams_(streams) {
        require(streams >= 1 && streams <= INT32_MAX, "streams is not a number of streams");
        for (const py::handle& item : datasets) {
            const auto fields = item.cast<py::tuple>();
            require(fields.size() == 4, "a dataset is (tokens, pointers, lengths, mapped)");
            const auto tokens = fields[0].cast<py::array>();
            const auto pointers = fields[1].cast<py::array>();
            const auto lengths = fields[2].cast<py::array>();
            const char kind = tokens.dtype().kind();
            const int itemsize = static_cast<int>(tokens.itemsize());
            require(kind == 'i' || (kind == 'u' && itemsize <= 2), "ids are not of a dtype of token ids");
            for (const py::array& array : {tokens, pointers, lengths}) {
                require(array.ndim() == 1, "an array is not flat");
                require(array.size() < 2 || array.strides(0) == array.itemsize(), "an array is not contiguous");
                require(array.dtype().byteorder() != '>', "an array is big endian");
                kept_.push_back(array);
            }
            require(pointers.dtype().kind() == 'i' && pointers.itemsize() == 8, "pointers are not int64");
            require(lengths.dtype().kind() == 'i' && lengths.itemsize() == 4, "lengths are not int32");
            require(pointers.size() == lengths.size(), "pointers and lengths differ in number");
            sources_.push_back({static_cast<const char*>(tokens.data()), tokens.nbytes(), itemsize, kind == 'i',
                                static_cast<const char*>(pointers.data()), static_cast<const char*>(lengths.data()),
                                lengths.size(), fields[3].cast<bool>(), streams});
        }
    }

    int64_t gather(const Array<int32_t>& dataset, const Array<int32_t>& document, const Array<int32_t>& start,
                   const Array<int32_t>& length, const Array<int32_t>& row_pointers, const py::object& strides,
                   int64_t pad_id, Array<int64_t> tokens, Array<uint8_t> goes_on) const {
        const bool grid = tokens.ndim() == 3;
        require((tokens.ndim() == 2 || grid) && tokens.shape(1) >= 2 && (grid ? tokens.shape(2) : 1) == streams_,
                "tokens is not [B, S + 1, streams], or [B, S + 1] for one stream, with S >= 1");
        auto batch = batch_of(dataset, document, start, length, row_pointers, tokens.shape(0));
        batch.width = tokens.shape(1) - 1;
        require(goes_on.size() == batch.segments, "goes_on is not one value a segment");
        Array<int32_t> stride_array;
        if (!strides.is_none()) {
            stride_array = strides.cast<Array<int32_t>>();
            require(stride_array.size() == batch.rows, "strides is not one value a row");
            for (int64_t row = 0; row < batch.rows; ++row) require(stride_array.data()[row] >= 0, "a stride is negative");
            batch.strides = stride_array.data();
        }
        int64_t* out = tokens.mutable_data();
        uint8_t* flags = goes_on.mutable_data();
        py::gil_scoped_release release;
        return ms::gather(sources_, batch, streams_, pad_id, out, flags);
    }

    void will_need(const Array<int32_t>& dataset, const Array<int32_t>& document, const Array<int32_t>& start,
                   const Array<int32_t>& length) const {
        const auto batch = batch_of(dataset, document, start, length, Array<int32_t>(), -1);
        py::gil_scoped_release release;
        ms::will_need(sources_, batch);
    }

    void drop_pages() const {
        py::gil_scoped_release release;
        ms::drop_pages(sources_);
    }

  private:
    static ms::SegmentBatch batch_of(const Array<int32_t>& dataset, const Array<int32_t>& document,
                                     const Array<int32_t>& start, const Array<int32_t>& length,
                                     const Array<int32_t>& row_pointers, int64_t rows) {
        const int64_t segments = dataset.size();
        require(document.size() == segments && start.size() == segments && length.size() == segments,
                "the columns of the segments differ in number");
        if (rows >= 0) {
            require(row_pointers.size() == rows + 1, "row_pointers is not [B + 1]");
            const int32_t* p = row_pointers.data();
            require(p[0] == 0 && p[rows] == segments, "row_pointers do not run from 0 to the number of segments");
            for (int64_t row = 0; row < rows; ++row) require(p[row] <= p[row + 1], "row_pointers decrease");
        }
        return {dataset.data(), document.data(), start.data(), length.data(),
                rows >= 0 ? row_pointers.data() : nullptr, nullptr, segments, rows, 0};
    }

    int64_t streams_;
    std::vector<ms::TokenSource> sources_;
    std::vector<py::array> kept_;
};

py::tuple bucketed(const Array<int32_t>& lengths, const Array<int32_t>& targets, int64_t max_tokens,
                   int64_t window) {
    require(max_tokens >= 1 && window >= 1, "max_tokens or window is below 1");
    require(lengths.size() == targets.size(), "lengths and targets differ in number");
    ms::PackedSegments packed;
    std::vector<int64_t> oversize;
    {
        py::gil_scoped_release release;
        packed = ms::pack_bucket(lengths.data(), targets.data(), lengths.size(), max_tokens, window, &oversize);
    }
    return py::make_tuple(owned(std::move(packed.seq_ptr)), owned(std::move(packed.position)),
                          owned(std::move(packed.start)), owned(std::move(packed.length)),
                          owned(std::move(oversize)));
}

}  // namespace

void megatron_speech::register_loader(py::module_& m) {
    const auto fixed = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("pack_bucket", &bucketed, fixed("lengths"), fixed("targets"), py::arg("max_tokens"), py::arg("window"),
          "(seq_ptr, position, start, length, oversize)");
    py::class_<TokenSources>(m, "TokenSources", "The datasets that batches are read from.")
        .def(py::init<const py::list&, int64_t>(), py::arg("datasets"), py::arg("streams"),
             "(tokens, pointers, lengths, mapped) of each dataset; ids of a step")
        .def("gather", &TokenSources::gather, fixed("dataset"), fixed("document"), fixed("start"), fixed("length"),
             fixed("row_pointers"), py::arg("strides"), py::arg("pad_id"), fixed("tokens"), fixed("goes_on"),
             "-1, or the first segment that does not exist: the outputs are then not to be used.")
        .def("will_need", &TokenSources::will_need, fixed("dataset"), fixed("document"), fixed("start"),
             fixed("length"), "Ask for the segments' bytes to be read from the disk.")
        .def("drop_pages", &TokenSources::drop_pages, "Give back the pages of the mapped files.");
}
