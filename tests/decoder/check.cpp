// Compares what decoder.hpp gives with a bundle's golden vectors.   g++ -std=c++17 -O2 check.cpp -o check && ./check BUNDLE
#include <cstdio>

#include "decoder.hpp"

int main(int, char** arguments) try {
    Bundle bundle(arguments[1]);
    const Json& golden = bundle.config["golden"];
    auto& given = bundle.files.at(golden["file"].text).tensors;
    double absolute = std::stod(golden["absolute"].text), relative = std::stod(golden["relative"].text);
    bool fine = true;
    for (const Json& feature : bundle.config["plan"]["features"].list) {
        const string& name = feature["name"].text;
        double worst = 0;
        int64_t compared = 0;
        auto compare = [&](const Floats& got, const Tensor& expected, int64_t i) {
            for (size_t j = 0; j < got.size(); ++j, ++compared) {
                float want = expected.get<float>(i * expected.columns + j);
                double off = std::abs(double(got[j]) - want);
                if (off > worst) worst = off;
                fine &= int64_t(got.size()) == expected.columns && off <= absolute + relative * std::abs(want);
            }
        };
        const Tensor &ids = given.at("ids." + name), &bags = given.at("bag_ids." + name), &offsets = given.at("offsets." + name);
        for (int64_t i = 0; i < ids.rows; ++i) compare(bundle.vector_of(feature, ids.get<int64_t>(i)), given.at("vectors." + name), i);
        for (const char* kind : {"pooled.", "weighted."})
            for (int64_t b = 0; b + 1 < offsets.rows && feature["pooling"].text != "none"; ++b) {
                int64_t first = offsets.get<int64_t>(b), last = offsets.get<int64_t>(b + 1);
                Floats sum(bundle.config["plan"]["dim"].integer(), 0.0f);
                for (int64_t i = first; i < last; ++i) {
                    Floats v = bundle.vector_of(feature, bags.get<int64_t>(i));
                    float weight = *kind == 'w' ? given.at("weights." + name).get<float>(i) : 1.0f;
                    for (size_t j = 0; j < sum.size(); ++j) sum[j] += weight * v[j];
                }
                if (feature["pooling"].text == "mean" && last > first)
                    for (float& x : sum) x /= float(last - first);
                compare(sum, given.at(kind + name), b);
            }
        printf("%s %lld %g\n", name.c_str(), static_cast<long long>(compared), worst);
    }
    return fine ? 0 : 1;
} catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
}
