// Mixed batches, each row with the matrices of its own adapter: the library's way of lora/mixed.py, mixed_packing.py and
// mixed_rows.py, the same operations in the same order. Of tensors that autograd does not follow.
#pragma once
#include <ATen/ScalarOps.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::ScalarType;
using at::Tensor;
using Tensors = std::vector<Tensor>;
using Flags = std::vector<bool>;

inline bool any(const Flags& flags) { return std::find(flags.begin(), flags.end(), true) != flags.end(); }

struct Packed {
    Tensor a;   // (total rank, in_features), or by slot (slots, columns of S, in_features), scaled
    Tensors b;  // scaled, (out_features, rank), or by slot (slots, out_features, columns); undefined without an adapter
};

// `RowGroups` of mixed_rows.py.
class Rows {
public:
    Rows(int64_t rows_, int64_t owners_, int64_t count_, Tensor slots_, Tensor taken_, Tensor empty_, Tensor places_)
        : rows(rows_), owners(owners_), count(count_), slots(std::move(slots_)), taken(std::move(taken_)),
          empty(std::move(empty_)), places(std::move(places_)) {}

    // t (tokens, k), each row by its own matrix of `stack` (slots, k, n), plus bias: (tokens, n), or into out.
    Tensor multiply(const Tensor& t, const Tensor& stack, Tensor out = {}, const Tensor& bias = {}) const {
        return product(take(t), stack, std::move(out), bias);
    }

    // Fills ds with dy b, and returns dy^T s by slot, (slots, features, columns).
    Tensor both_gradients(const Tensor& dy, const Tensor& b, const Tensor& s, Tensor ds, ScalarType dtype) const {
        const Tensor own = take(dy);
        product(own, b, std::move(ds));
        return sum(own, take(s), dtype);
    }

    // The sum over the rows of each slot of t^T u, (slots, k, n), of t (tokens, k) and u (tokens, n).
    Tensor outer(const Tensor& t, const Tensor& u, ScalarType dtype) const { return sum(take(t), take(u), dtype); }

private:
    // (groups, tokens of a group, features)
    Tensor take(const Tensor& t) const {
        const auto features = t.size(1);
        Tensor own = t;
        if (taken.defined()) {
            own = t.view({rows, t.size(0) / rows, features}).index_select(0, taken);
            if (empty.defined()) own.index_fill_(0, empty, 0.0);
        }
        return own.view({count, own.numel() / std::max<int64_t>(count * features, 1), features});
    }

    // The same of what `take` gave.
    Tensor product(const Tensor& t, const Tensor& stack, Tensor out = {}, const Tensor& bias = {}) const {
        const Tensor matrices = slots.defined() ? stack.index_select(0, slots) : stack;
        if (out.defined() && !taken.defined()) {
            Tensor grouped = out.view({t.size(0), t.size(1), out.size(1)});
            bias.defined() ? at::baddbmm_out(grouped, bias, t, matrices) : at::bmm_out(grouped, t, matrices);
            return out;
        }
        Tensor y = bias.defined() ? at::baddbmm(bias, t, matrices) : at::bmm(t, matrices);
        if (places.defined()) {
            const auto all = taken.size(0);
            y = y.view({all, y.size(1) * count / all, y.size(2)}).index_select(0, places);
        }
        y = y.reshape({y.size(0) * y.size(1), y.size(2)});
        return out.defined() ? out.copy_(y) : y;
    }

    Tensor sum(const Tensor& t, const Tensor& u, ScalarType dtype) const {
        const auto own = t.scalar_type(), exact = c10::promoteTypes(own, at::kFloat);
        const auto wide = !slots.defined() && c10::elementSize(dtype) == c10::elementSize(own) ? own : exact;
        const Tensor turned = t.mT();
        Tensor product;
        if (wide == own) {
            product = at::bmm(turned, u);
        } else if (t.is_cuda()) {
            product = at::bmm(turned, u, wide);
        } else {
            product = at::bmm(turned.to(wide), u.to(wide));
        }
        if (!slots.defined()) return product;
        Tensor total = at::zeros({owners, product.size(1), product.size(2)}, product.options());
        if (!product.is_cuda()) return total.index_add_(0, slots, product);
        const c10::List<std::optional<Tensor>> at_slots({std::optional<Tensor>(slots)});
        return at::index_put_(total, at_slots, product, true);
    }

    int64_t rows, owners, count;
    Tensor slots, taken, empty, places;  // or undefined
};

// What the scalings of all columns are multiplied by: one number, or (slots, columns, 1).
struct Scalings {
    double number = 1.0;
    Tensor table;  // or undefined

    // t (slots, columns, ..), which may be written over.
    Tensor times(const Tensor& t, ScalarType dtype) const {
        if (!table.defined() && number == 1.0) return t.to(dtype);
        const Tensor factors = table.defined() ? table.to(c10::promoteTypes(t.scalar_type(), at::kFloat))
                                               : at::native::wrapped_scalar_tensor(number);
        Tensor out = t.scalar_type() == dtype ? t : at::empty(t.sizes(), t.options().dtype(dtype));
        return at::mul_out(out, t, factors);
    }
};

// The adapters of a mixed batch's projections, one projection after the other, and whose they are.
struct Owned {
    int64_t slots;
    std::vector<int64_t> counts;                   // adapters of each projection
    std::vector<int64_t> slot_of;                  // of each adapter; -1 for one that no row has
    std::vector<int64_t> first;                    // adapter of each projection
    std::vector<std::vector<int64_t>> adapter_of;  // of each projection and slot; -1 for none

    Owned(int64_t slots_, std::vector<int64_t> counts_, std::vector<int64_t> slot_of_)
        : slots(slots_), counts(std::move(counts_)), slot_of(std::move(slot_of_)) {
        int64_t adapter = 0;
        for (const auto count : counts) {
            first.push_back(adapter);
            adapter_of.emplace_back(slots, -1);
            for (int64_t j = 0; j < count; ++j, ++adapter) {
                if (slot_of[adapter] >= 0) adapter_of.back()[slot_of[adapter]] = adapter;
            }
        }
    }

    // Those of all adapters that are projection i's.
    at::TensorList of(size_t i, at::TensorList all) const { return all.slice(first[i], counts[i]); }
    Flags of(size_t i, const Flags& all) const {
        return Flags(all.begin() + first[i], all.begin() + first[i] + counts[i]);
    }

    // As `mixed_packing.pack`.
    Packed pack(at::TensorList as, at::TensorList bs, const Scalings& scalings, ScalarType dtype) const {
        Packed packed;
        packed.b.resize(counts.size());
        if (as.empty()) return packed;
        std::vector<int64_t> widths;  // of each projection, columns of S: those of its largest adapter
        for (size_t i = 0; i < counts.size(); ++i) {
            widths.push_back(0);
            for (const auto& a : of(i, as)) widths[i] = std::max(widths[i], a.size(0));
        }
        packed.a = scalings.times(stacked_a(as, widths), dtype);
        for (size_t i = 0; i < counts.size(); ++i) {
            if (widths[i] == 0 || packed.b[i].defined()) continue;
            std::vector<size_t> members;
            for (size_t j = i; j < counts.size(); ++j) {
                if (widths[j] == widths[i]) members.push_back(j);
            }
            stack_b(packed, members, widths[i], as[0], bs, dtype);
        }
        return packed;
    }

    // ds[:] = dy up of projection i; and dB of each of its adapters bs that is trained.
    Tensors up_gradients(const Rows& rows, size_t i, const Tensor& dy, const Tensor& s, const Tensor& up, Tensor ds,
                         at::TensorList bs, const Flags& trained) const {
        if (!s.defined() || !any(trained)) {
            rows.multiply(dy, up, ds);
            return Tensors(bs.size());
        }
        const auto dtype = widest(bs);
        return apart(rows.both_gradients(dy, up, s, ds, dtype).to(dtype), 1, i, bs, trained);
    }

    // dA of each adapter that is trained, of those of all projections.
    Tensors down_gradients(const Rows& rows, const Tensor& ds, const Tensor& x, const Scalings& scalings,
                           at::TensorList as, const Flags& trained) const {
        const auto dtype = widest(as);
        const Tensor joint = scalings.times(rows.outer(ds, x, dtype), dtype);
        Tensors found;
        int64_t column = 0;
        for (size_t i = 0; i < counts.size(); ++i) {
            int64_t width = 0;
            for (const auto& a : of(i, as)) width = std::max(width, a.size(0));
            const auto from = std::exchange(column, column + width);
            auto own = any(of(i, trained)) ? apart(joint.narrow(1, from, width), 0, i, of(i, as), of(i, trained))
                                           : Tensors(counts[i]);
            found.insert(found.end(), own.begin(), own.end());
        }
        return found;
    }

    // The part of each adapter of projection i that is trained, of a stack by slot of gradients of `parameters`, in
    // whose dimension `ranks` they may have less.
    Tensors apart(const Tensor& stack, int64_t ranks, size_t i, at::TensorList parameters, const Flags& trained) const {
        const Tensors parts = stack.unbind();
        Tensors found(parameters.size());
        for (size_t j = 0; j < parameters.size(); ++j) {
            if (!trained[j]) continue;
            const auto slot = slot_of[first[i] + j];
            if (slot < 0) {
                found[j] = at::zeros_like(parameters[j]);
                continue;
            }
            const auto rank = parameters[j].size(ranks);
            found[j] = parts[slot].size(ranks) == rank ? parts[slot] : parts[slot].narrow(ranks, 0, rank);
            const auto dtype = parameters[j].scalar_type();
            if (found[j].scalar_type() != dtype) found[j] = found[j].to(dtype);
        }
        return found;
    }

private:
    static ScalarType widest(at::TensorList tensors) {
        auto found = tensors[0].scalar_type();
        for (const auto& tensor : tensors) found = c10::promoteTypes(found, tensor.scalar_type());
        return found;
    }

    Tensor stacked_a(at::TensorList as, const std::vector<int64_t>& widths) const {
        const auto options = as[0].options();
        const auto in_features = as[0].size(1);
        int64_t columns = 0;
        for (const auto width : widths) columns += width;
        Tensors pieces;
        for (int64_t slot = 0; slot < slots; ++slot) {
            for (size_t i = 0; i < counts.size(); ++i) {
                const auto own = adapter_of[i][slot];
                const auto rank = own < 0 ? 0 : as[own].size(0);
                if (own >= 0) pieces.push_back(as[own]);
                if (rank < widths[i]) pieces.push_back(at::zeros({widths[i] - rank, in_features}, options));
            }
        }
        const Tensor joined = pieces.empty() ? at::empty({0, in_features}, options) : at::cat(pieces);
        return joined.view({slots, columns, in_features});
    }

    void stack_b(Packed& packed, const std::vector<size_t>& members, int64_t width, const Tensor& like,
                 at::TensorList bs, ScalarType dtype) const {
        Tensors pieces;
        int64_t total = 0, from = 0;
        for (const auto i : members) total += bs[first[i]].size(0);
        for (int64_t slot = 0; slot < slots; ++slot) {
            for (const auto i : members) {
                const auto own = adapter_of[i][slot];
                if (own < 0) {
                    pieces.push_back(at::zeros({bs[first[i]].size(0), width}, like.options()));
                } else {
                    const auto missing = width - bs[own].size(1);
                    pieces.push_back(missing ? at::constant_pad_nd(bs[own], {0, missing}) : bs[own]);
                }
            }
        }
        const Tensor joined = pieces.empty() ? at::empty({0, width}, like.options()) : at::cat(pieces);
        const Tensor stack = joined.to(dtype).view({slots, total, width});
        for (const auto i : members) {
            const auto features = bs[first[i]].size(0);
            packed.b[i] = stack.narrow(1, std::exchange(from, from + features), features);
        }
    }
};

// Whose adapter each row has, and the adapters of some projections.
struct Mixed {
    std::shared_ptr<const Rows> rows;
    std::shared_ptr<const Owned> owned;
    Scalings scalings;
};

}  // namespace
