// Collectives and a message ring in shared memory, for shared_memory.py, which says what the operations promise.
// Knows nothing of torch: addresses, counts and a dtype code come in.
//
// A segment of collectives, for ranks 0 to N - 1 (member.h has its first part):
//
//     [page: nonce][lines of the ranks, to a whole page][rank 0: buffer 0][rank 0: buffer 1][rank 1: buffer 0] ...
//
// A rank's buffers are written by it alone, and stand on its own NUMA node (part_ends() says where they end). A ring
// has its bytes where the buffers would be.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../../kernels/cpu/add_reduced.h"
#include "member.h"
#include "sum.h"

namespace phalanx {
namespace {

// Operations in rounds. In round s a rank writes to its buffer of parity s, sets its flag to s, and reads the buffers
// of those whose flag has reached s. It enters round s only when every flag has reached s-1: then every rank is done
// reading round s-2, whose buffers it is about to write. No rank ever waits for others to finish.
//
//     round        s                       s+1                   s+2
//     rank 0       write buffer s%2  read  write the other  read write buffer s%2: rank 1 is in s+1, it has read s
//     rank 1          write buffer s%2  read  write the other  read ...
//
// With one buffer a second barrier would be needed in each round, which is what a decode step waits for.
class Collectives : public Member {
 public:
    Collectives(int fd, int rank, int size, size_t buffer_bytes, size_t one_shot_bytes, double timeout_s, int spin_us)
        : Member(fd, rank, size, data_bytes(size, buffer_bytes), timeout_s, spin_us),
          buffer_bytes_(buffer_bytes),
          one_shot_bytes_(std::min(one_shot_bytes, buffer_bytes)),
          sources_(size) {}

    static size_t data_bytes(int size, size_t buffer_bytes) { return 2 * size * buffer_bytes; }
    // Where each rank's buffers end; before those of rank 0 stands what is everybody's.
    static std::vector<size_t> part_ends(int size, size_t buffer_bytes) {
        std::vector<size_t> ends(size);
        for (int rank = 0; rank < size; ++rank) ends[rank] = data_offset(size) + data_bytes(rank + 1, buffer_bytes);
        return ends;
    }

    // With a `total` of floats, adds the sums to it as well.
    void all_reduce(uintptr_t address, size_t count, int dtype_code, uintptr_t total) {
        const auto dtype = static_cast<Dtype>(dtype_code);
        const size_t item = item_bytes(dtype);
        auto* x = reinterpret_cast<char*>(address);
        run("all_reduce", [&] {
            if (count * item > kReleaseBytes) release_gil();
            const bool one_shot = count * item <= one_shot_bytes_;
            for (size_t done = 0; done < count;) {
                const size_t chunk = std::min(count - done, buffer_bytes_ / item);
                one_shot ? reduce_once(x, chunk, dtype) : reduce_slices(x + done * item, chunk, dtype);
                done += chunk;
            }
            if (total != 0) add_(dtype, reinterpret_cast<float*>(total), x, count);
        });
    }

    // An AddReduced, whose group is one of these.
    static void add_reduced(void* group, void* x, int64_t count, int item_bytes, float* total) {
        py::gil_scoped_acquire gil;
        static_cast<Collectives*>(group)->all_reduce(reinterpret_cast<uintptr_t>(x), size_t(count),
                                                     int(item_bytes == 4 ? Dtype::float32 : Dtype::bfloat16),
                                                     reinterpret_cast<uintptr_t>(total));
    }

    // The addresses of the two.
    std::pair<uintptr_t, uintptr_t> reducer() {
        const AddReduced function = &Collectives::add_reduced;
        return {reinterpret_cast<uintptr_t>(function), reinterpret_cast<uintptr_t>(this)};
    }

    void gather(uintptr_t address, size_t bytes, uintptr_t out, int dst) {
        const auto* x = reinterpret_cast<const char*>(address);
        auto* parts = reinterpret_cast<char*>(out);
        run("gather", [&] {
            if (bytes > kReleaseBytes) release_gil();
            for (size_t done = 0; done < bytes; done += buffer_bytes_) {
                const size_t chunk = std::min(bytes - done, buffer_bytes_);
                begin(kGather, dst, bytes);
                if (rank_ != dst) std::memcpy(buffer(rank_), x + done, chunk);
                post();
                for (int peer = 0; rank_ == dst && peer < size_; ++peer) {
                    if (peer != rank_) await(peer);
                    std::memcpy(parts + peer * bytes + done, peer == rank_ ? x + done : buffer(peer), chunk);
                }
            }
        });
    }

    void broadcast(uintptr_t address, size_t bytes, int src) {
        auto* x = reinterpret_cast<char*>(address);
        run("broadcast", [&] {
            if (bytes > kReleaseBytes) release_gil();
            for (size_t done = 0; done < bytes; done += buffer_bytes_) {
                const size_t chunk = std::min(bytes - done, buffer_bytes_);
                begin(kBroadcast, src, bytes);
                if (rank_ == src) std::memcpy(buffer(rank_), x + done, chunk);
                post();
                if (rank_ == src) continue;
                await(src);
                std::memcpy(x + done, buffer(src), chunk);
            }
        });
    }

    void barrier() {
        run("barrier", [&] {
            begin(kBarrier, 0, 0);
            post();
            await_all();
        });
    }

 private:
    enum Kind : uint64_t { kBarrier, kGather, kBroadcast, kOneShot, kScatter, kCollect };

    // Small messages, in one round: each rank reads all messages and sums them by itself. (N - 1) messages are read by
    // each, but there is one wait; a message of a few KB is there sooner than a second flag.
    void reduce_once(char* x, size_t count, Dtype dtype) {
        const size_t bytes = count * item_bytes(dtype);
        begin(kOneShot, int(dtype), bytes);
        std::memcpy(buffer(rank_), x, bytes);
        post();
        await_all();
        for (int peer = 0; peer < size_; ++peer) sources_[peer] = peer == rank_ ? x : buffer(peer);
        sum_(dtype, x, sources_.data(), size_, count);
    }

    // Large messages, in two rounds: each rank sums one slice, then takes the others' sums. Of N = 3:
    //
    //     scatter    rank 0 sums slice 0 of all     rank 1 sums slice 1     rank 2 sums slice 2
    //     collect    and each takes the two slices that the others have summed
    //
    // A rank reads (N - 1) / N of a message twice, instead of N - 1 whole ones.
    void reduce_slices(char* x, size_t count, Dtype dtype) {
        const size_t item = item_bytes(dtype);
        const size_t slice = ((count + size_ - 1) / size_ * item + kLine - 1) / kLine * kLine;
        const auto low = [&](int rank) { return std::min(slice * rank, count * item); };
        const size_t mine = low(rank_), bytes = low(rank_ + 1) - mine;
        begin(kScatter, int(dtype), count);
        std::memcpy(buffer(rank_), x, mine);
        std::memcpy(buffer(rank_) + mine + bytes, x + mine + bytes, count * item - mine - bytes);
        post();
        await_all();
        for (int peer = 0; peer < size_; ++peer) sources_[peer] = (peer == rank_ ? x : buffer(peer)) + mine;
        sum_(dtype, x + mine, sources_.data(), size_, bytes / item);

        begin(kCollect, int(dtype), count);
        std::memcpy(buffer(rank_) + mine, x + mine, bytes);
        post();
        for (int step = 1; step < size_; ++step) {
            const int peer = (rank_ + step) % size_;
            await(peer);
            std::memcpy(x + low(peer), buffer(peer) + low(peer), low(peer + 1) - low(peer));
        }
    }

    // A rank's buffer of this round's parity.
    char* buffer(int rank) const { return data() + (2 * rank + (round_ & 1)) * buffer_bytes_; }

    // Enters the next round. The signature is what all ranks must agree on: the operation, its detail and its length.
    void begin(Kind kind, int detail, size_t length) {
        ++round_;
        for (int peer = 0; peer < size_; ++peer)
            if (peer != rank_) wait(peer, round_ - 1, true);
        signature_ = kind << 60 | uint64_t(detail) << 52 | length;
    }

    void post() {
        line(rank_).signatures[round_ & 1] = signature_;
        publish(round_);
    }

    // Returns once `peer` has posted this round; throws if it is in another operation.
    void await(int peer) {
        wait(peer, round_, true);
        if (line(peer).signatures[round_ & 1] != signature_)
            fail("rank " + std::to_string(peer) + " called another operation, or with another size or dtype");
    }

    // Begins with the next rank, as every rank does: they look at different lines.
    void await_all() {
        for (int step = 1; step < size_; ++step) await((rank_ + step) % size_);
    }

    static constexpr size_t kLine = 64;
    const size_t buffer_bytes_, one_shot_bytes_;
    std::vector<const void*> sources_;
    const Sum sum_ = fastest_sum();
    const Add add_ = fastest_add();
    uint32_t round_ = 0;
    uint64_t signature_ = 0;
};

// A stream of bytes from rank 0 to all others. Rank 0's flag counts the bytes written, another's the bytes it has read.
class Ring : public Member {
 public:
    Ring(int fd, int rank, int size, size_t capacity, double timeout_s, int spin_us)
        : Member(fd, rank, size, capacity, timeout_s, spin_us), capacity_(uint32_t(capacity)) {}

    // Where each rank's part ends: rank 0, which alone writes to the ring, has all of it.
    static std::vector<size_t> part_ends(int size, size_t capacity) {
        return std::vector<size_t>(size, data_offset(size) + capacity);
    }

    // A message is its length, 8 bytes, and its content.
    void send(const py::bytes& message) {
        char* content = nullptr;
        Py_ssize_t length = 0;
        if (PyBytes_AsStringAndSize(message.ptr(), &content, &length) != 0) throw py::error_already_set();
        const uint64_t header = uint64_t(length);
        run("send", [&] {
            if (Clock::now() - looked_ > kTick) {
                look_around(position_ + 1);  // which no reader can have reached
                looked_ = Clock::now();
            }
            if (header > kReleaseBytes) release_gil();
            write(reinterpret_cast<const char*>(&header), sizeof(header));
            write(content, header);
            publish(position_);
        });
    }

    py::bytes receive() {
        PyObject* message = nullptr;
        try {
            run("receive", [&] {
                uint64_t length = 0;
                read(reinterpret_cast<char*>(&length), sizeof(length));
                acquire_gil();
                message = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(length));
                if (message == nullptr) throw py::error_already_set();
                if (length > kReleaseBytes) release_gil();
                read(PyBytes_AS_STRING(message), length);
            });
        } catch (...) {
            Py_XDECREF(message);
            throw;
        }
        return py::reinterpret_steal<py::bytes>(message);
    }

 private:
    void write(const char* from, size_t bytes) {
        while (bytes > 0) {
            const uint32_t piece = uint32_t(std::min<size_t>(bytes, capacity_ / 4));
            const uint32_t target = position_ + piece - capacity_;
            // A reader must be so far that the piece overwrites nothing it still needs. Before it is waited for, what
            // is written is published: else it would have nothing to read.
            for (int peer = 1; peer < size_; ++peer) {
                if (!reached(seen_[peer], target)) publish(position_);
                wait(peer, target, true);
            }

            // Up to the ring's end, and what is left from its beginning on.
            const uint32_t at = position_ % capacity_, first = std::min(piece, capacity_ - at);
            std::memcpy(data() + at, from, first);
            std::memcpy(data(), from + first, piece - first);
            position_ += piece;
            from += piece;
            bytes -= piece;
        }
    }

    void read(char* to, size_t bytes) {
        while (bytes > 0) {
            wait(0, position_ + 1, false);
            const uint32_t piece = uint32_t(std::min<size_t>(bytes, seen_[0] - position_));
            const uint32_t at = position_ % capacity_, first = std::min(piece, capacity_ - at);
            std::memcpy(to, data() + at, first);
            std::memcpy(to + first, data(), piece - first);
            position_ += piece;
            to += piece;
            bytes -= piece;
            publish(position_);
        }
    }

    const uint32_t capacity_;
    uint32_t position_ = 0;
    Clock::time_point looked_ = Clock::now();
};

}  // namespace
}  // namespace phalanx

PYBIND11_MODULE(_native, module) {
    namespace py = pybind11;
    using phalanx::Collectives;
    using phalanx::Ring;
    // Whichever extension a Failure passes through on its way to Python.
    module.def("raise_as", [](py::object exception) {
        static PyObject* raised = nullptr;
        Py_XDECREF(std::exchange(raised, exception.release().ptr()));
        py::register_exception_translator([](std::exception_ptr thrown) {
            try {
                std::rethrow_exception(thrown);
            } catch (const phalanx::Failure& failure) {
                PyErr_SetString(raised, failure.what());
            }
        });
    });
    py::class_<Collectives>(module, "Collectives")
        .def(py::init<int, int, int, size_t, size_t, double, int>())
        .def_static("part_ends", &Collectives::part_ends)
        .def("all_reduce", &Collectives::all_reduce)
        .def("reducer", &Collectives::reducer)
        .def("gather", &Collectives::gather)
        .def("broadcast", &Collectives::broadcast)
        .def("barrier", &Collectives::barrier)
        .def("waited", &Collectives::waited)
        .def("close", &Collectives::close);
    py::class_<Ring>(module, "Ring")
        .def(py::init<int, int, int, size_t, double, int>())
        .def_static("part_ends", &Ring::part_ends)
        .def("send", &Ring::send)
        .def("receive", &Ring::receive)
        .def("close", &Ring::close);
}
